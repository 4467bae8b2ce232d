"""Exact key-value caches for denoising in any order.

A token's keys and values are final iff its id, noise level and position are final and everything it
may attend to is final, recursively. A token attends to orders up to its own, and a noise group
opens when every free group of lower order is closed. So the columns below the lowest order that
still has a free mask are final: the condition before the first step, then one block after the other
(Arriola et al. 2025, arXiv 2503.09573, section 3). Columns above the order that is being written
are neither seen nor written yet, and are not computed at all.

Columns of the lowest order see nothing but each other. So where rows share them (one picture and
many questions, the unconditional branch of every row) they are computed once for all rows, and
kept for later calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import Compute, KeyValueCache, Tokens, previous_columns
from multimodal_dlm.models.noise_conditioning import Modulation, NoiseConditioning
from multimodal_dlm.models.positions import Rotary
from multimodal_dlm.models.prefix_memory import Prefix, PrefixMemory, Recorder

LONG = 256  # Columns; a mask between as many and those that see them costs more than a forward.


@dataclass(frozen=True)
class ExactCacheConfig:
    """Asks for the exact cache: `transformer.enable_cache(ExactCacheConfig())`.

    Args:
        num_prefixes: Rows' prefixes kept from call to call; the oldest goes first. 0 keeps none.

    Raises:
        ConfigError: When the number is no whole number, 0 or more.
    """

    num_prefixes: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.num_prefixes, int) or self.num_prefixes < 0:
            raise ConfigError(
                f"`num_prefixes` must be a whole number, 0 or more; got {self.num_prefixes!r}. Use"
                " 0 to keep nothing between calls."
            )


class ExactCache(KeyValueCache):
    """Keys and values of the final columns of one canvas; nothing in it is approximate.

    A forward computes the open columns, and with them those that have become final since the last
    one: the forward that commits a block is the first forward of the next block. The ids of kept
    columns are compared at every forward, so a canvas that was changed behind the cache's back
    starts it anew. No gradients flow through a forward with the cache.

    Args:
        plan: Plan of the canvas.
        is_free: Positions the sampler may write, (batch, length).
        logits_shift: The model's: 1 where a token is read from the state of the one before it.
        memory: Prefixes of earlier calls; None shares within this canvas only.

    Raises:
        ConfigError: When the shapes differ.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        is_free: Bool[Tensor, "batch length"],
        *,
        logits_shift: int = 0,
        memory: PrefixMemory | None = None,
    ) -> None:
        if is_free.shape != plan.order.shape:
            raise ConfigError(
                f"`is_free` must have the plan's shape {tuple(plan.order.shape)}; got"
                f" {tuple(is_free.shape)}."
            )
        self.is_free = is_free
        self.plan = plan  # Of the present forward: open queries, kept keys first.
        self._whole = plan
        self._beyond = int(plan.order.max()) + 1 if plan.order.numel() else 0
        self._current: int | None = None
        self._read: Sequence[int] | slice | None = None
        self._reach: int | None = None
        self._wanted = -1
        self._memory = PrefixMemory(0) if memory is None else memory
        source = plan.order
        if logits_shift:
            source = plan.order.gather(1, previous_columns(plan.is_padding))
        self._source_order = source
        self.open: Int[Tensor, " open"] = torch.arange(self.length, device=is_free.device)
        self._forget()

    def _forget(self) -> None:
        self.kept: Int[Tensor, " kept"] = self._whole.order.new_zeros(0)
        self._kept_ids: Int[Tensor, "batch kept"] | None = None
        self._num_final = 0
        self._current = None
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._views: dict[int, _Views] = {}
        self._turned: tuple[Tensor, Rotary] | None = None
        self._states: Tensor | None = None
        self._pending: _Base | None = None

    @property
    def length(self) -> int:
        """Columns of the canvas."""
        return self._whole.order.shape[1]

    def read(self, columns: Sequence[int] | slice) -> None:
        """Say which columns' logits the next forwards are for.

        Only what they need is computed then: with shifted logits a token is read from the state of
        the one before it, so a causal step computes one column, the token that was written last.
        Without it the forwards compute everything up to the lowest order with a free mask.
        """
        if columns == self._read:
            return
        part = self._source_order[:, columns]
        self._read = columns
        self._reach = int(part.max()) if part.numel() else None

    @torch.no_grad()
    def run(self, compute: Compute, tokens: Tokens) -> Float[Tensor, "batch length width"]:
        """States of the whole canvas, 0 in columns that have not been computed yet."""
        self._share_base(compute, tokens)
        columns = self.begin(tokens.noise_levels, tokens.input_ids)
        if LONG <= self._num_final < len(columns):
            columns = self._finish_final(compute, tokens)
        return self.finish(compute(tokens.select(columns), self.plan, self))

    def _finish_final(self, compute: Compute, tokens: Tokens) -> Int[Tensor, " open"]:
        """Compute what is final by itself, so that no mask is needed; returns what is left."""
        rest, self.open = self.open[self._num_final :], self.open[: self._num_final]
        self.plan = self._whole.select(self.open, self.kept)
        self.finish(compute(tokens.select(self.open), self.plan, self))
        self.open, self.plan = rest, self._whole.select(rest, self.kept)
        return rest

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with some of the rows; only those that change place are copied."""
        self.is_free, self._whole = self.is_free[rows], self._whole.select_rows(rows)
        self._source_order, self._read = self._source_order[rows], None
        count = len(self.kept)
        self.plan = self._whole.select(self.open, self.kept)
        if self._kept_ids is not None:
            self._kept_ids = self._kept_ids[rows]
        if self._states is not None:
            self._states = _move_rows(self._states, rows, self.length)
        self._keys_values = {
            layer: (_move_rows(keys, rows, count), _move_rows(values, rows, count))
            for layer, (keys, values) in self._keys_values.items()
        }
        self._views = {}

    def modulation(self, conditioning: NoiseConditioning, tokens: Tokens) -> Modulation | None:
        """The noise conditioning of some tokens, whose tables are kept by the levels present."""
        return self._memory.levels.modulation(conditioning, tokens)

    def rotary(
        self,
        make: Callable[[Tensor, torch.dtype], Rotary],
        position_ids: Int[Tensor, "batch length axes"],
        dtype: torch.dtype,
    ) -> Rotary:
        """`make(position_ids, dtype)`, or what it gave at the last forward of these positions."""
        known = self._turned
        if known is None or known[1].cos.dtype != dtype or not torch.equal(known[0], position_ids):
            self._turned = known = (position_ids, make(position_ids, dtype))
        return known[1]

    def begin(
        self,
        noise_levels: Float[Tensor, "batch length"],
        input_ids: Int[Tensor, "batch length"] | None = None,
    ) -> Int[Tensor, " open"]:
        """The columns this forward must compute, final ones first; sets `plan` to theirs.

        Args:
            noise_levels: Level of each token; above 0 where it is masked.
            input_ids: Ids, to notice a changed canvas; None with embeddings, whose caller must not
                change final columns.

        Raises:
            ConfigError: When the canvas has another length than the cache was made for.
        """
        if noise_levels.shape[1] != self.length:
            raise ConfigError(
                f"`kv_cache` was made for {self.length} columns; got {noise_levels.shape[1]}. Make"
                " a new one with `new_cache`."
            )
        order, padding = self._whole.order, self._whole.is_padding
        is_waiting = self.is_free & (noise_levels > 0)
        current = int(order.masked_fill(~is_waiting, self._beyond).min()) if order.numel() else 0
        if self._is_stale(current, input_ids):
            self._forget()
        wanted = current if self._reach is None else self._reach
        if (current, wanted) != (self._current, self._wanted):
            is_final = ((order < current) | padding).all(dim=0)
            is_open = ((order <= max(wanted, current - 1)) & ~padding).any(dim=0)
            is_open[self.kept] = False
            final = (is_final & is_open).nonzero().flatten()
            self.open = torch.cat([final, (is_open & ~is_final).nonzero().flatten()])
            self.plan = self._whole.select(self.open, self.kept)
            self._num_final, self._current, self._wanted = len(final), current, wanted
        if input_ids is not None and self._num_final:
            ids = input_ids[:, self.open[: self._num_final]]
            known = [] if self._kept_ids is None else [self._kept_ids]
            self._kept_ids = torch.cat([*known, ids], dim=1)
        return self.open

    def _is_stale(self, current: int, input_ids: Tensor | None) -> bool:
        """True when a kept column is no longer what it was."""
        if self._current is not None and current < self._current:
            return True
        if input_ids is None or self._kept_ids is None:
            return False
        return not torch.equal(input_ids[:, self.kept], self._kept_ids)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values one layer attends to: the kept ones, then those of this forward.

        Args:
            layer: Index of the block.
            keys: Of the open columns, (batch, open, heads, dim).
            values: The same.
        """
        first, last = len(self.kept), len(self.kept) + keys.shape[1]
        if layer not in self._keys_values:
            shape = (keys.shape[0], self.length, *keys.shape[2:])
            self._keys_values[layer] = (keys.new_empty(shape), values.new_empty(shape))
        views = self._views.get(layer)
        if views is None or views.span != (first, last):
            whole = self._keys_values[layer]
            written = (whole[0][:, first:last], whole[1][:, first:last])
            views = _Views((first, last), written, (whole[0][:, :last], whole[1][:, :last]))
            self._views[layer] = views
        views.written[0].copy_(keys)
        views.written[1].copy_(values)
        return views.seen

    def finish(self, hidden_states: Float[Tensor, "batch open width"]) -> Tensor:
        """States of the whole canvas, 0 in columns that have not been computed yet.

        They are the cache's own: a copy of the canvas's states at every forward would cost as much
        as a small forward.
        """
        if self._states is None:
            shape = (hidden_states.shape[0], self.length, hidden_states.shape[-1])
            self._states = hidden_states.new_zeros(shape)
        self._states.index_copy_(1, self.open, hidden_states.detach())
        if self._num_final:
            self.kept = torch.cat([self.kept, self.open[: self._num_final]])
            self.open = self.open[self._num_final :]
            self.plan = self._whole.select(self.open, self.kept)
            self._num_final = 0
        if self._pending is not None:
            self._remember(self._pending)
        return self._states

    # The columns of the lowest order.

    def _share_base(self, compute: Compute, tokens: Tokens) -> None:
        """Before the first forward: take the base of each row from memory or from another row.

        Where every row needs its own the first forward computes it with the rest, and it is
        remembered afterwards.
        """
        if self._current is not None or tokens.input_ids is None or tokens.has_conditioning:
            return
        base = self._base(tokens)
        if base is None:
            return
        missing = {key: row for row, key in enumerate(base.keys) if key not in self._memory}
        if len(missing) == len(base.keys):
            self._pending = base
            return
        if missing:
            rows = torch.tensor(list(missing.values()), device=tokens.input_ids.device)
            plan = self._whole.select_rows(rows).restrict(base.columns)
            recorder = Recorder()
            states = compute(tokens.select(base.columns).select_rows(rows), plan, recorder)
            found = {
                key: recorder.prefix(states, place, base.is_there[row])
                for place, (key, row) in enumerate(missing.items())
            }
        else:
            found = {}
        self._adopt(base, [found.get(key) or self._memory.get(key) for key in base.keys], tokens)
        self._memory.add(found)

    def _base(self, tokens: Tokens) -> "_Base | None":
        """Final columns of the lowest order; None without any, or when one may still change."""
        order, padding = self._whole.order, self._whole.is_padding
        lowest = int(order.masked_fill(padding, self._beyond).min()) if order.numel() else 0
        is_base = (order == lowest) & ~padding
        is_waiting = self.is_free & (tokens.noise_levels > 0) & is_base
        columns = (is_base.any(dim=0) & (is_base | padding).all(dim=0)).nonzero().flatten()
        if not len(columns) or bool(is_waiting.any()):
            return None
        if not bool((~is_base & ~padding).any()):
            return None  # Nothing would be left to compute with it.
        documents = self._whole.document_ids[:, columns]
        keys = tokens.select(columns).row_keys(padding[:, columns], documents)
        return _Base(columns, ~padding[:, columns], keys)

    def _adopt(self, base: "_Base", prefixes: Sequence[Prefix | None], tokens: Tokens) -> None:
        """Begin with the base kept; what padding keeps is 0 and never seen."""
        given = [prefix for prefix in prefixes if prefix is not None]
        assert tokens.input_ids is not None
        rows, count = len(given), len(base.columns)
        for layer in given[0].keys_values:
            for_layer = [prefix.keys_values[layer] for prefix in given]
            shape = (rows, self.length, *for_layer[0][0].shape[1:])
            keys, values = for_layer[0][0].new_zeros(shape), for_layer[0][1].new_zeros(shape)
            keys[:, :count][base.is_there] = torch.cat([own for own, _ in for_layer])
            values[:, :count][base.is_there] = torch.cat([own for _, own in for_layer])
            self._keys_values[layer] = (keys, values)
        self._views = {}
        states = given[0].states
        self._states = states.new_zeros((rows, self.length, states.shape[-1]))
        places, columns = base.is_there.nonzero(as_tuple=True)
        self._states[places, base.columns[columns]] = torch.cat([p.states for p in given])
        self.kept = base.columns
        self._kept_ids = tokens.input_ids[:, base.columns]

    def _remember(self, base: "_Base") -> None:
        """Hand the base of every row to the memory, now that a forward has computed it."""
        assert self._states is not None
        self._pending = None
        if self._memory.capacity:
            places = torch.searchsorted(self.kept, base.columns)
            found = {}
            for row, key in enumerate(base.keys):
                is_there = base.is_there[row]
                own = places[is_there]
                parts = {
                    layer: (keys[row, own], values[row, own])
                    for layer, (keys, values) in self._keys_values.items()
                }
                found[key] = Prefix(parts, self._states[row, base.columns[is_there]])
            self._memory.add(found)


@dataclass(frozen=True)
class _Views:
    """Columns of one layer's keys and values: those of this forward, and all that are seen."""

    span: tuple[int, int]
    written: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Base:
    """Columns of the lowest order; for each row its tokens there and what their states need."""

    columns: Int[Tensor, " base"]
    is_there: Bool[Tensor, "batch base"]
    keys: list[bytes]


def _move_rows(whole: Tensor, rows: Int[Tensor, " rows"], num_columns: int) -> Tensor:
    """The first columns of `whole[rows]` in its own memory; what follows them is left as it is."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
    if len(moved):
        whole[moved, :num_columns] = whole[rows[moved], :num_columns]
    return whole[: len(rows)]
