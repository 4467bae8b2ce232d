"""Approximate caches for models whose tokens all see each other (`condition_attention: full`).

Under full attention every token's keys depend on every other token, so none is ever final. These
caches compute some columns of a forward and let them attend to the keys the others had when they
were last computed. What they differ in is which columns: one class each says it in `_columns`. All
of them refresh what has grown old: a column is computed again once more than `refresh_share` of the
free tokens changed since its key was computed, and everything every `refresh_interval` forwards.
`PrefixCache` and `DualCache` also compute everything when another window or block is written.
`evaluation.cache_divergence` measures what that costs.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import Compute, KeyValueCache, Tokens, previous_columns

# States (count, width) and the modality of each -> probability of the likeliest token, (count,).
Probability = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ApproximateCacheConfig:
    """What all approximate caches have in common.

    Args:
        refresh_share: Share of the free tokens, in (0, 1], that may change before a key that was
            computed earlier is computed again.
        refresh_interval: Forwards after which everything is computed again; None for never.

    Raises:
        ConfigError: When an option is out of range.
    """

    refresh_share: float = 0.25
    refresh_interval: int | None = None
    cache: ClassVar[type["ApproximateCache"]]

    def __post_init__(self) -> None:
        if not 0.0 < self.refresh_share <= 1.0:
            raise ConfigError(
                f"`refresh_share` must be in (0, 1]; got {self.refresh_share}. Use 1.0 to let"
                " everything change."
            )
        if self.refresh_interval is not None and self.refresh_interval < 1:
            raise ConfigError(
                f"`refresh_interval` must be 1 or more; got {self.refresh_interval}. Use None for"
                " no regular refresh."
            )

    def build(
        self, model: Any, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
    ) -> "ApproximateCache":
        """The cache of one canvas."""
        return self.cache(self, plan, is_free, logits_shift=int(model.config["logits_shift"]))


class ApproximateCache(KeyValueCache):
    """Keys, values and states of all columns as they were last computed.

    Args:
        config: Options.
        plan: Plan of the canvas.
        is_free: Positions the sampler may write.
        logits_shift: 1 where a token is read from the state of the one before it.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (
        "is_free",
        "_sources",
        "_num_changed",
        "_changed_before",
        "_ids",
        "_states",
    )
    # Whether everything is computed in the first forward over another window.
    follows_windows: ClassVar[bool] = False

    def __init__(
        self,
        config: Any,
        plan: AttentionPlan,
        is_free: Bool[Tensor, "batch length"],
        *,
        logits_shift: int = 0,
    ) -> None:
        self.config = config
        self.is_free = is_free
        self.num_columns_computed = 0
        self._whole = plan
        index = torch.arange(self.length, device=is_free.device)
        # The column whose state each token is read from.
        self._sources = (
            previous_columns(plan.is_padding) if logits_shift else index.expand(is_free.shape)
        )
        self._read: Bool[Tensor, " length"] = torch.ones_like(is_free[0])
        self._is_elsewhere = False  # Another window is read than in the last forward.
        self._open = index
        self._plan: AttentionPlan | None = None  # Of the open columns.
        self._ids: Int[Tensor, "batch length"] | None = None
        self._states: Tensor | None = None
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_forwards = 0
        # Tokens changed in the run so far, and how many had when each key was computed.
        self._num_changed = torch.zeros(len(is_free), dtype=torch.long, device=is_free.device)
        self._changed_before = torch.zeros_like(is_free, dtype=torch.long)

    @property
    def length(self) -> int:
        """Columns of the canvas."""
        return self._whole.order.shape[1]

    def read(self, columns: Sequence[int] | slice) -> None:
        """Say which columns' logits the next forwards are for."""
        is_read = torch.zeros_like(self._read)
        is_read[columns] = True
        is_read[self._sources[:, is_read].flatten()] = True
        self._is_elsewhere |= not torch.equal(is_read, self._read)
        self._read = is_read

    def run(self, compute: Compute, tokens: Tokens) -> Float[Tensor, "batch length width"]:
        """States of the whole canvas, those not computed now as they were last computed.

        The next forward writes into them.
        """
        if tokens.noise_levels.shape[1] != self.length:
            raise ConfigError(
                f"`kv_cache` was made for {self.length} columns; got"
                f" {tokens.noise_levels.shape[1]}. Make a new one with `new_cache`."
            )
        is_masked = self.is_free & (tokens.noise_levels > 0)
        is_changed = self._note_changes(tokens.input_ids)
        interval = self.config.refresh_interval
        is_due = interval is not None and self._num_forwards % interval == 0
        is_due |= self.follows_windows and self._is_elsewhere
        self._is_elsewhere = False
        if self._states is None or is_due:
            is_open = torch.ones_like(self._read)
        else:
            is_open = self._columns(is_masked, is_changed) | self._old()
        is_open &= ~self._whole.is_padding.all(dim=0)
        columns = is_open.nonzero().flatten()
        if self._plan is None or not torch.equal(columns, self._open):
            self._open, self._plan = columns, self._whole.queries_at(columns)
        states = compute(tokens.select(self._open), self._plan, self).detach()
        if self._states is None:
            self._states = states.new_zeros((len(states), self.length, states.shape[-1]))
        self._states.index_copy_(1, self._open, states)
        self._changed_before[:, self._open] = self._num_changed[:, None]
        self._note_states(tokens, is_masked)
        self._num_forwards += 1
        self.num_columns_computed += len(self._open)
        return self._states

    def _note_changes(self, input_ids: Tensor | None) -> Bool[Tensor, "batch length"]:
        """Which tokens are not what they were at the last forward."""
        if input_ids is None or self._ids is None:
            is_changed = torch.zeros_like(self.is_free)
        else:
            is_changed = input_ids != self._ids
        self._ids = None if input_ids is None else input_ids.clone()
        self._num_changed = self._num_changed + is_changed.sum(dim=1)
        return is_changed

    def _old(self) -> Bool[Tensor, " length"]:
        """Columns whose keys were computed too many changes ago, in some row."""
        age = self._num_changed[:, None] - self._changed_before
        limit = self.config.refresh_share * self.is_free.sum(dim=1, keepdim=True)
        return ((age > limit) & ~self._whole.is_padding).any(dim=0)

    def _note_states(self, tokens: Tokens, is_masked: Bool[Tensor, "batch length"]) -> None:
        """Look at the states of the open columns, for a later choice of columns."""

    @abstractmethod
    def _columns(
        self, is_masked: Bool[Tensor, "batch length"], is_changed: Bool[Tensor, "batch length"]
    ) -> Bool[Tensor, " length"]:
        """The columns to compute in a forward that is not a refresh."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values in their places; all of them are attended to."""
        if layer not in self._keys_values:
            shape = (keys.shape[0], self.length, *keys.shape[2:])
            self._keys_values[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        whole_keys, whole_values = self._keys_values[layer]
        whole_keys.index_copy_(1, self._open, keys.detach())
        whole_values.index_copy_(1, self._open, values.detach())
        return whole_keys, whole_values

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with some of the rows."""
        self._whole, self._plan = self._whole.select_rows(rows), None
        for name in self.row_tensors:
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])
        self._keys_values = {
            layer: (keys[rows], values[rows]) for layer, (keys, values) in self._keys_values.items()
        }


class PrefixCache(ApproximateCache):
    """Keeps what stands left of the window that is written; see `PrefixCacheConfig`."""

    follows_windows = True

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        first = int(self._read.to(torch.int8).argmax())
        return torch.arange(self.length, device=self._read.device) >= first


class DualCache(ApproximateCache):
    """Keeps everything but the window that is written; see `DualCacheConfig`."""

    follows_windows = True

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        return self._read


class DelayedCache(ApproximateCache):
    """Keeps a token from one forward after it was written; see `DelayedCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        is_open = (is_masked | is_changed).any(dim=0)
        is_open[self._sources[is_masked]] = True
        return is_open


class FeatureCache(ApproximateCache):
    """Computes the tokens whose surroundings moved most; see `FeatureCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        is_response = self.is_free.any(dim=0)
        interval = self.config.prompt_interval
        is_prompt_due = interval is not None and self._num_forwards % interval == 0
        count = math.ceil(self.config.share * int(is_response.sum()))
        age = (self._num_changed[:, None] - self._changed_before).amax(dim=0)
        # The oldest first; of equals a written token goes before a mask.
        rank = age * 2 + (~is_masked).all(dim=0)
        chosen = rank.masked_fill(~is_response, -1).topk(count).indices
        is_open = is_changed.any(dim=0)
        is_open[chosen] = True
        is_open[self._sources[is_masked & is_open]] = True
        return is_open | (~is_response & is_prompt_due)


class ConfidenceCache(ApproximateCache):
    """Keeps known tokens and masks whose proposal is likely; see `ConfidenceCacheConfig`."""

    row_tensors = (*ApproximateCache.row_tensors, "_likeliest")

    def __init__(self, *args: Any, probability: Probability, **options: Any) -> None:
        super().__init__(*args, **options)
        self._probability = probability
        # Of the proposal of each free mask when its state was last computed.
        self._likeliest = torch.zeros_like(self.is_free, dtype=torch.float32)

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        # A known token is certain.
        is_unsure = self._likeliest.masked_fill(~is_masked, 1.0) <= self.config.threshold
        is_open = (is_unsure | is_changed).any(dim=0)
        is_open[self._sources[is_unsure]] = True
        return is_open

    def _note_states(self, tokens: Tokens, is_masked: Tensor) -> None:
        if tokens.modality_ids is None:
            raise ConfigError(
                "`modality_ids` must be given with a cache that looks at proposals; got None. Pass"
                " those of the canvas."
            )
        assert self._states is not None
        is_new = torch.zeros_like(self._read)
        is_new[self._open] = True
        rows, columns = (is_masked & is_new[self._sources]).nonzero(as_tuple=True)
        states = self._states[rows, self._sources[rows, columns]]
        found = self._probability(states, tokens.modality_ids[rows, columns])
        self._likeliest[rows, columns] = found


@dataclass(frozen=True, kw_only=True)
class PrefixCacheConfig(ApproximateCacheConfig):
    """Keep the columns left of the window that is written (Wu et al. 2025, arXiv 2505.22618).

    The window is that of a modality, or the block of a text in blocks; the first forward over
    another one computes everything, as in the paper.
    """

    cache = PrefixCache


@dataclass(frozen=True, kw_only=True)
class DualCacheConfig(ApproximateCacheConfig):
    """Keep the columns on both sides of the window that is written (the same, section 3.2).

    The first forward over another window computes everything, as for `PrefixCacheConfig`.
    """

    cache = DualCache


@dataclass(frozen=True, kw_only=True)
class DelayedCacheConfig(ApproximateCacheConfig):
    """Keep a token one forward after it was written (dKV-Cache, Ma et al. 2025, arXiv 2505.15781).

    A token's keys move most in the forward after it is written, so that one still computes it.
    """

    refresh_interval: int | None = 8
    cache = DelayedCache


@dataclass(frozen=True, kw_only=True)
class FeatureCacheConfig(ApproximateCacheConfig):
    """Partial refresh of the response, rare refresh of the prompt (dLLM-Cache, arXiv 2506.06295).

    The paper picks tokens by how far their values moved; here they are picked by how many tokens
    changed since theirs were computed, which needs no forward to find out.

    Args:
        prompt_interval: Forwards between refreshes of what is not free; None for never.
        share: Share of the free columns computed at least, in (0, 1].
    """

    prompt_interval: int | None = 25
    share: float = 0.25
    refresh_share: float = 1.0
    refresh_interval: int | None = 8
    cache = FeatureCache

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.share)


@dataclass(frozen=True, kw_only=True)
class ConfidenceCacheConfig(ApproximateCacheConfig):
    """Keep masks the model is sure of, for pictures (after ML-Cache of arXiv 2510.06308).

    A forward computes masks whose likeliest token was no likelier than the threshold when they were
    last computed, and tokens that have just been written; by each branch's own logits, before they
    are guided. The paper keeps a fixed share of all positions, those with the largest logit,
    written or not, and nothing in the first steps; here nothing is kept that is not likely, and
    nothing that has become old by `refresh_share`.

    Args:
        threshold: Probability in [0, 1] that a proposal must exceed to be kept. 1.0 keeps nothing:
            everything is computed at every forward, known tokens too.

    Raises:
        ConfigError: When an option is out of range.
    """

    threshold: float = 0.9
    refresh_interval: int | None = 5
    cache = ConfidenceCache

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(
                f"`threshold` must be in [0, 1]; got {self.threshold}. Use 1.0 to keep nothing."
            )

    def build(
        self, model: Any, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
    ) -> ConfidenceCache:
        """The cache of one canvas, which reads proposals with the model's head."""

        @torch.no_grad()
        def probability(states: Tensor, modality_ids: Tensor) -> Tensor:
            found = states.new_empty(len(states), dtype=torch.float32)
            for index, name in enumerate(model.vocabulary.modalities):
                chosen = modality_ids == index
                logits = model.compute_logits(states[chosen], name)
                found[chosen] = logits.float().softmax(dim=-1).amax(dim=-1)
            return found

        shift = int(model.config["logits_shift"])
        return ConfidenceCache(self, plan, is_free, logits_shift=shift, probability=probability)


def _check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"`share` must be in (0, 1]; got {share}. Use 1.0 to compute all.")
