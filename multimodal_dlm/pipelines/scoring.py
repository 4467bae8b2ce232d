"""Likelihood of pictures and texts: the NELBO of each row of any task, with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.diffusion.likelihood import (
    LikelihoodEstimate,
    chain_nelbo,
    monte_carlo_nelbo,
)
from multimodal_dlm.diffusion.losses import token_nll
from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds
from multimodal_dlm.processing import TASKS, Codes, UnifiedProcessor


def masked_nll(
    transformer: Any, canvas: Canvas, is_masked: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Nll in nats of the true tokens at positions that are masked for it, float64; 0 elsewhere.

    Args:
        transformer: Backbone.
        canvas: Clean rows.
        is_masked: Positions to mask, of any modality.
    """
    vocabulary = transformer.vocabulary
    input_ids, parts = canvas.input_ids, []
    for index, name in enumerate(vocabulary.modalities):
        is_own = is_masked & (canvas.modality_ids == index)
        input_ids = input_ids.masked_fill(is_own, vocabulary.mask_token_id(name))
        parts.append((name, is_own))
    noisy = canvas.replace(input_ids=input_ids)
    states = transformer(
        input_ids,
        noise_levels=noise_levels(noisy, vocabulary),
        modality_ids=noisy.modality_ids,
        position_ids=noisy.position_ids,
        attention_plan=AttentionPlan.from_canvas(noisy),
    ).hidden_states
    nll = torch.zeros(is_masked.shape, dtype=torch.float64, device=is_masked.device)
    for name, is_own in parts:
        if bool(is_own.any()):
            logits = transformer.compute_logits(states[is_own], name)
            columns = vocabulary.to_columns(canvas.input_ids[is_own], name)
            nll[is_own] = token_nll(logits, None, columns, num_columns=logits.shape[-1]).double()
    return nll


class CanvasScorer:
    """Answers, for one row: with these positions masked, what is the nll of each true token?

    Args:
        transformer: Backbone.
        canvas: One clean row.
        batch_size: Masks at once.

    Raises:
        ConfigError: When the canvas has not exactly one row.
    """

    def __init__(self, transformer: Any, canvas: Canvas, *, batch_size: int = 64) -> None:
        if canvas.batch_size != 1:
            raise ConfigError(
                f"`canvas` must have one row; got {canvas.batch_size}. Use `select_rows`."
            )
        self.transformer = transformer
        self.canvas = canvas
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, is_masked: Bool[Tensor, "draws length"]) -> Float[Tensor, "draws length"]:
        """Nll in nats at the masked positions, float64; 0 elsewhere."""
        return torch.cat([self._score(part) for part in is_masked.split(self.batch_size)])

    def _score(self, is_masked: Bool[Tensor, "draws length"]) -> Float[Tensor, "draws length"]:
        rows = torch.zeros(len(is_masked), dtype=torch.long, device=self.canvas.device)
        return masked_nll(self.transformer, self.canvas.select_rows(rows), is_masked)


@dataclass(frozen=True)
class RankedText:
    """A text and what a picture says about it.

    Args:
        text: The text.
        score: NELBO(text) - NELBO(text given the picture) in nats: how much likelier the picture
            makes it.
        place: Where it stood in the list that was ranked.
    """

    text: str
    score: float
    place: int


class ScoringMixin:
    """Gives a pipeline `score` and `rank_texts`."""

    transformer: Any
    processor: UnifiedProcessor

    def score(
        self,
        task: str,
        *,
        image: Any = None,
        codes: Codes | None = None,
        text: str | Sequence[str | None] | None = None,
        question: str | Sequence[str | None] | None = None,
        num_draws: int = 64,
        generator: Generators = None,
        batch_size: int = 64,
    ) -> list[LikelihoodEstimate]:
        """Negative log-likelihood bounds of rows, in nats a row.

        What is scored, and given what, is the task's: `text_to_image` the picture given the text,
        `caption` the text given the picture, `vqa` the answer (`text`) given picture and question,
        `unconditional_image` and `unconditional_text` one modality alone, `text` an answer given a
        question without a picture, `joint` both: NELBO(text, picture masked) + NELBO(picture, text
        clean), a chain of bounds (Ou et al. 2024, arXiv 2406.03736, Eq. 14, for each). A text is
        its tokens and one `<eos>` in a window of just that length, which the model sees: the bound
        is on the text given its length. Guidance and temperature are no part of a likelihood.

        Args:
            task: One of `processing.TASKS`.
            image: Pictures, one per row: anything `to_pixels` takes.
            codes: Image codes instead of pictures, a tuple over levels of (batch, h, w).
            text: Captions or answers, one per row.
            question: Questions or instructions, one per row.
            num_draws: Masks per row (twice for `joint`), even and at least 2; twice the number of
                tokens gives every count exactly two draws.
            generator: One generator or one per row; None for fresh randomness. The same seed for
                two rows gives them the same masks, which sharpens comparisons.
            batch_size: Masks at once.

        Returns:
            One estimate per row, with a 95 % interval over masks (`low`, `high`).

        Raises:
            ConfigError: When the task is unknown, an input is missing or too many, `num_draws` is
                odd or below 2, or the model writes texts in blocks.
        """
        if task not in TASKS:
            raise unknown_name("task", task, TASKS)
        if self.processor.blocks:
            raise ConfigError(
                "`score` needs a model that writes a text in one piece; this one writes blocks of"
                f" {', '.join(map(str, self.processor.blocks))} tokens. Read `eval/nelbo` of its"
                " training run instead."
            )
        if image is not None or codes is not None:
            codes = self._given_codes(image, codes)  # type: ignore[attr-defined]
        canvas = self.processor.score(
            task, codes=codes, texts=_listed(text), questions=_listed(question)
        )
        seeds = draw_row_seeds(generator, canvas.batch_size)
        device = self._execution_device  # type: ignore[attr-defined]
        return [
            self._score_row(
                task, _without_padding(canvas, row).to(device), seed, num_draws, batch_size
            )
            for row, seed in enumerate(seeds)
        ]

    def rank_texts(
        self,
        image: Any = None,
        texts: Sequence[str] = (),
        *,
        codes: Codes | None = None,
        num_draws: int = 16,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
    ) -> list[RankedText]:
        """Texts by how much likelier one picture makes them: retrieval, reranking of captions.

        The difference of two bounds, each with the same masks for all texts of one length. What is
        common in captions costs little with and without a picture, so it does not win by being
        common, as it would by the bound alone.

        Args:
            image: One picture.
            texts: Candidates, written as the model was trained to write captions; at least one.
            codes: Its codes in place of the picture.
            num_draws: Masks per text and bound, even and at least 2.
            generator: Of the masks; None for fresh randomness.
            batch_size: Masks at once.

        Returns:
            The texts, the best first; equal ones in the order given.

        Raises:
            ConfigError: When there is not exactly one picture, or no text.
        """
        given = self._given_codes(image, codes)  # type: ignore[attr-defined]
        if len(given[0]) != 1 or isinstance(texts, str) or not texts:
            raise ConfigError(
                "`rank_texts` ranks a list of texts for one picture; got"
                f" {len(given[0])} pictures and {texts!r:.60}. Call it once per picture."
            )
        (seed,) = draw_row_seeds(generator, 1)

        repeated = tuple(level.expand(len(texts), *level.shape[1:]) for level in given)

        def bounds(task: str) -> list[float]:
            found = self.score(
                task,
                codes=repeated,
                text=list(texts),
                generator=[torch.Generator().manual_seed(seed) for _ in texts],
                num_draws=num_draws,
                batch_size=batch_size,
            )
            return [estimate.value for estimate in found]

        alone, given_picture = bounds("unconditional_text"), bounds("caption")
        gains = [a - b for a, b in zip(alone, given_picture, strict=True)]
        ranked = [RankedText(texts[place], gain, place) for place, gain in enumerate(gains)]
        return sorted(ranked, key=lambda row: -row.score)

    def _score_row(
        self, task: str, canvas: Canvas, seed: int, num_draws: int, batch_size: int
    ) -> LikelihoodEstimate:
        generator = torch.Generator().manual_seed(seed)
        scorer = CanvasScorer(self.transformer, canvas, batch_size=batch_size)
        is_free = canvas.is_free[0]
        options: dict[str, Any] = {"num_draws": num_draws, "generator": generator}
        if task != "joint":
            return monte_carlo_nelbo(scorer, is_free, **options)
        names = list(self.transformer.vocabulary.modalities)
        is_text = is_free & (canvas.modality_ids[0] == names.index("text"))
        return chain_nelbo(scorer, is_text, is_free & ~is_text, **options)


def _listed(value: str | Sequence[str | None] | None) -> list[str | None] | None:
    return [value] if isinstance(value, str) else None if value is None else list(value)


def _without_padding(canvas: Canvas, row: int) -> Canvas:
    """One row, the columns that are padding in it left out."""
    alone = canvas.select_rows(slice(row, row + 1))
    return alone.select_columns(~alone.is_padding[0])
