"""What every cache of ours is to the backbone, and what a forward is to a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.noise_conditioning import Modulation, NoiseConditioning
from multimodal_dlm.models.positions import Rotary


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward, of the whole canvas or of some columns.

    Args:
        input_ids: Unified ids, or None with embeddings.
        inputs_embeds: Embeddings in place of ids.
        noise_levels: Level of each token.
        position_ids: Rotary coordinates.
        conditioning_embeds: Added to the noise embedding of every token of a row.
        modality_ids: Which modality's columns a position is read in; no state depends on it.
    """

    input_ids: Int[Tensor, "batch length"] | None
    inputs_embeds: Float[Tensor, "batch length width"] | None
    noise_levels: Float[Tensor, "batch length"]
    position_ids: Int[Tensor, "batch length axes"]
    conditioning_embeds: Float[Tensor, "batch width"] | None = None
    modality_ids: Int[Tensor, "batch length"] | None = None

    @property
    def has_conditioning(self) -> bool:
        """True with `conditioning_embeds`, on which every state depends."""
        return self.conditioning_embeds is not None

    def select(self, columns: Int[Tensor, " columns"]) -> "Tokens":
        """Some columns, in the order given."""
        return replace(
            self,
            input_ids=None if self.input_ids is None else self.input_ids[:, columns],
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[:, columns],
            noise_levels=self.noise_levels[:, columns],
            position_ids=self.position_ids[:, columns],
            modality_ids=None if self.modality_ids is None else self.modality_ids[:, columns],
        )

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Tokens":
        """Some rows."""
        conditioning = self.conditioning_embeds
        return Tokens(
            input_ids=None if self.input_ids is None else self.input_ids[rows],
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[rows],
            noise_levels=self.noise_levels[rows],
            position_ids=self.position_ids[rows],
            conditioning_embeds=None if conditioning is None else conditioning[rows],
            modality_ids=None if self.modality_ids is None else self.modality_ids[rows],
        )

    def row_keys(
        self,
        is_padding: Bool[Tensor, "batch length"],
        document_ids: Int[Tensor, "batch length"],
    ) -> list[bytes]:
        """For each row everything its states depend on, as bytes, where all have one order.

        Padding has no part in it: a row has the same key beside longer ones as alone.
        """
        assert self.input_ids is not None
        levels = self.noise_levels.double().view(torch.int64)
        parts = torch.stack([self.input_ids, levels, document_ids], dim=-1)
        rows = torch.cat([parts, self.position_ids], dim=-1).cpu().numpy()
        is_there = ~is_padding.cpu().numpy()
        return [row[own].tobytes() for row, own in zip(rows, is_there, strict=True)]


class Derived:
    """What a forward derives from levels and positions alone: here made afresh each time."""

    def modulation(self, conditioning: NoiseConditioning, tokens: Tokens) -> Modulation | None:
        """The noise conditioning of some tokens."""
        return conditioning(tokens.noise_levels, tokens.conditioning_embeds)

    def rotary(
        self,
        make: Callable[[Tensor, torch.dtype], Rotary],
        position_ids: Int[Tensor, "batch length axes"],
        dtype: torch.dtype,
    ) -> Rotary:
        """`make(position_ids, dtype)`."""
        return make(position_ids, dtype)


FRESH = Derived()


class LayerStore(Derived, ABC):
    """Takes the keys and values of one layer and gives back those to attend to."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Columns of the canvas it is for."""

    @abstractmethod
    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, queries, heads, dim) of this forward -> (batch, keys, heads, dim)."""


# Runs the blocks: tokens and their plan -> normalised final states of the same columns.
Compute = Callable[[Tokens, AttentionPlan, LayerStore | None], Tensor]


class KeyValueCache(LayerStore):
    """Base of the caches of one canvas and one branch."""

    @abstractmethod
    def read(self, columns: Sequence[int] | slice) -> None:
        """Say which columns' logits the next forwards are for."""

    @abstractmethod
    def run(self, compute: Compute, tokens: Tokens) -> Float[Tensor, "batch length width"]:
        """States of the whole canvas, those not computed now as they were last computed.

        The next forward may write into them.
        """

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with some of the rows."""


def previous_columns(is_padding: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Column of the previous non-padding token of the row (of the token itself at the start)."""
    index = torch.arange(is_padding.shape[1], device=is_padding.device).expand(is_padding.shape)
    last = torch.where(is_padding, -1, index).cummax(dim=1).values
    previous = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return torch.where(previous < 0, index, previous)
