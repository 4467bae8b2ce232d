"""Left to right with a preallocated cache, and what a forward over a few tokens costs."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import Compute, KeyValueCache, Tokens


class SteppingCache(KeyValueCache):
    """Keys and values of all tokens so far, in memory taken once for the longest row.

    Every token that is fed sees all before it; within one forward that is what the plan says.

    Args:
        capacity: Most tokens of a row.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_tokens = 0
        self.last_state: Tensor | None = None
        self.plan: AttentionPlan | None = None
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.capacity

    def read(self, columns: Any) -> None:
        """Every forward is read at its last token."""

    def select_rows(self, rows: Tensor) -> None:
        self._keys_values = {n: (k[rows], v[rows]) for n, (k, v) in self._keys_values.items()}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._keys_values:
            shape = (keys.shape[0], self.capacity, *keys.shape[2:])
            self._keys_values[layer] = (keys.new_empty(shape), values.new_empty(shape))
        whole_keys, whole_values = self._keys_values[layer]
        stop = self.num_tokens + keys.shape[1]
        whole_keys[:, self.num_tokens : stop] = keys
        whole_values[:, self.num_tokens : stop] = values
        return whole_keys[:, :stop], whole_values[:, :stop]

    def run(self, compute: Compute, tokens: Tokens) -> Tensor:
        assert self.plan is not None
        states = compute(tokens, self.plan, self)
        self.num_tokens += states.shape[1]
        self.last_state = states[:, -1]
        return states


class Stepper:
    """Feeds tokens to a causal backbone.

    Args:
        model: Backbone.
        batch_size: Rows.
        capacity: Most tokens of a row.
    """

    def __init__(self, model: Any, batch_size: int, capacity: int) -> None:
        self.model = model
        self.cache = SteppingCache(capacity)
        one = torch.zeros(batch_size, 1, dtype=torch.long)
        self._plan_of_one = AttentionPlan.build(order=one)
        self._no_noise = torch.zeros(batch_size, capacity)

    def feed(self, ids: Tensor, positions: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        """States of the last token after some more, (batch, width)."""
        self.cache.plan = self._plan_of_one if plan is None else plan
        self.model(
            ids,
            noise_levels=self._no_noise[:, : ids.shape[1]],
            position_ids=positions,
            attention_plan=self.cache.plan,
            kv_cache=self.cache,
        )
        assert self.cache.last_state is not None
        return self.cache.last_state


@torch.no_grad()
def decode(pipe: Any, prompts: list[str], gen_length: int, *, may_end: bool = True) -> Tensor:
    """Greedy text, one token a forward, until every row has its `<eos>`.

    Args:
        pipe: Pipeline over a causal backbone.
        prompts: Instructions of one length in tokens.
        gen_length: Most tokens, `<eos>` included.
        may_end: False goes on after `<eos>`, as random weights must.

    Returns:
        Text codes (batch, gen_length), `<fill>` behind `<eos>`.

    Raises:
        ValueError: When the prompts differ in length: this loop knows no padding.
    """
    canvas = pipe.processor.text(prompts, gen_length=gen_length)
    if bool(canvas.is_padding.any()):
        raise ValueError("`prompts` must have one length in tokens; got several.")
    vocabulary = pipe.transformer.vocabulary
    start = vocabulary.columns("text").start
    eos, fill = (vocabulary.column_of(name, "text") for name in ("eos", "fill"))
    first = canvas.length - gen_length
    stepper = Stepper(pipe.transformer, canvas.batch_size, canvas.length)
    prompt = canvas.select_columns(slice(0, first))
    positions = canvas.position_ids
    state = stepper.feed(
        prompt.input_ids, positions[:, :first], AttentionPlan.build(order=prompt.order)
    )
    codes = torch.full((canvas.batch_size, gen_length), fill)
    is_ended = torch.zeros(canvas.batch_size, dtype=torch.bool)
    for step in range(gen_length):
        logits = pipe.transformer.compute_logits(state, "text")
        chosen = logits.argmax(dim=-1)
        if may_end:
            chosen = torch.where(chosen == fill, eos, chosen)  # The pipeline's length rule.
            is_ended, was_ended = is_ended | (chosen == eos), is_ended
            codes[:, step] = torch.where(was_ended, fill, chosen)
        else:
            codes[:, step] = chosen
        if bool(is_ended.all()) or step + 1 == gen_length:
            break
        place = slice(first + step, first + step + 1)
        state = stepper.feed((chosen + start)[:, None], positions[:, place])
    return codes


@torch.no_grad()
def forward_seconds(
    model: Any, batch_size: int, context: int, counts: list[int], repeats: int
) -> dict[int, float]:
    """Median seconds of a forward over q tokens that see a kept context, logits included.

    Args:
        model: Backbone.
        batch_size: Rows.
        context: Tokens whose keys and values are kept.
        counts: The q to time, in interleaved rounds.
        repeats: Rounds; one more warms up.
    """
    steppers = {}
    start = model.vocabulary.columns("text").start
    for count in counts:
        stepper = Stepper(model, batch_size, context + count)
        ids = torch.full((batch_size, context), start + 2)
        positions = torch.arange(context).expand(batch_size, -1)[..., None].expand(-1, -1, 3)
        order = torch.zeros(batch_size, context, dtype=torch.long)
        stepper.feed(ids, positions, AttentionPlan.build(order=order))
        steppers[count] = stepper
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(repeats + 1):
        for count, stepper in steppers.items():
            stepper.cache.num_tokens = context
            ids = torch.full((batch_size, count), start + 2)
            positions = context + torch.arange(count).expand(batch_size, -1)[..., None]
            plan = AttentionPlan.build(order=torch.zeros(batch_size, count, dtype=torch.long))
            begun = time.perf_counter()
            states = model(
                ids,
                noise_levels=torch.zeros(batch_size, count),
                position_ids=positions.expand(-1, -1, 3),
                attention_plan=_use(stepper, plan),
                kv_cache=stepper.cache,
            ).hidden_states
            model.compute_logits(states, "text")
            if number:
                seconds[count].append(time.perf_counter() - begun)
    return {count: statistics.median(values) for count, values in seconds.items()}


def _use(stepper: Stepper, plan: AttentionPlan) -> AttentionPlan:
    stepper.cache.plan = plan
    return plan
