"""Likelihood of pictures and texts: the NELBO of each row of any task, with its interval.

A model that writes token by token has the likelihood itself, in one forward.
"""

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
from multimodal_dlm.models.cache_base import previous_columns
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
    return _true_nll(transformer, canvas, states, parts)


def causal_nll(transformer: Any, canvas: Canvas) -> Float[Tensor, "batch length"]:
    """Nll in nats of each free token given all before it in the row's order, float64; 0 elsewhere.

    The sum over a row is exactly -log p(free tokens | known tokens before them), by the chain rule:
    in a causal row no state depends on a later token, so one forward on the clean row gives every
    factor. Known tokens after a free one would not be seen; the canonical rows have none.

    Args:
        transformer: Backbone with `logits_shift` 1, as `autoregressive` trains.
        canvas: Clean rows in causal order, such as those of a causal layout.

    Raises:
        ConfigError: When a token would see itself: the model does not shift its logits, or two
            tokens of a row share an attention order.
    """
    shift = transformer.config["logits_shift"]
    if shift != 1:
        raise ConfigError(
            f"An exact likelihood needs a model with `logits_shift` 1; got {shift}: its tokens see"
            " themselves. Train it with `objective.name: autoregressive`."
        )
    ranks = canvas.order.sort(dim=1).values
    before = canvas.order.gather(1, previous_columns(canvas.is_padding))
    is_own = (ranks[:, 1:] > ranks[:, :-1]).all()
    if not bool(is_own & (before < canvas.order)[canvas.is_free].all()):
        raise ConfigError(
            "An exact likelihood needs rows in which each token has its own `order`, above that of"
            " the token it is predicted from; got others. Use a layout with `condition_attention:"
            " causal`."
        )
    states = transformer(
        canvas.input_ids,
        # As in training: a causal row holds no noise, its masks stand for an absent condition.
        noise_levels=torch.zeros(canvas.input_ids.shape, device=canvas.device),
        modality_ids=canvas.modality_ids,
        position_ids=canvas.position_ids,
        attention_plan=AttentionPlan.from_canvas(canvas),
    ).hidden_states
    parts = [
        (name, canvas.is_free & (canvas.modality_ids == index))
        for index, name in enumerate(transformer.vocabulary.modalities)
    ]
    return _true_nll(transformer, canvas, states, parts)


def _true_nll(
    transformer: Any,
    canvas: Canvas,
    states: Float[Tensor, "batch length width"],
    parts: Sequence[tuple[str, Bool[Tensor, "batch length"]]],
) -> Float[Tensor, "batch length"]:
    """Nll of the true tokens of each modality at its positions, float64; 0 elsewhere."""
    nll = torch.zeros(canvas.input_ids.shape, dtype=torch.float64, device=canvas.device)
    for name, is_own in parts:
        if bool(is_own.any()):
            logits = transformer.compute_logits(states[is_own], name)
            columns = transformer.vocabulary.to_columns(canvas.input_ids[is_own], name)
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
        """Negative log-likelihoods of rows, in nats a row: bounds, or exact ones of causal models.

        What is scored, and given what, is the task's: `text_to_image` the picture given the text,
        `caption` the text given the picture, `vqa` the answer (`text`) given picture and question,
        `unconditional_image` and `unconditional_text` one modality alone, `text` an answer given a
        question without a picture, `joint` both: NELBO(text, picture masked) + NELBO(picture, text
        clean), a chain of bounds (Ou et al. 2024, arXiv 2406.03736, Eq. 14, for each). A text is
        its tokens and one `<eos>` in a window of just that length, which the model sees: the bound
        is on the text given its length. Guidance and temperature are no part of a likelihood.

        A causal model (`condition_attention: causal`, `logits_shift` 1) gives the negative
        log-likelihood itself, by the chain rule: nothing is drawn and the error is 0. It does not
        know a text's length beforehand, so that its text includes where it ends; `joint` is the
        picture, then the text given it.

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
            batch_size: Masks at once; rows at once where nothing is drawn.

        Returns:
            One estimate per row, with a 95 % interval over masks (`low`, `high`), which is a point
            where nothing was drawn.

        Raises:
            ConfigError: When the task is unknown, an input is missing or too many, `num_draws` is
                odd or below 2, the model writes texts in blocks of several tokens, or a cache of
                Diffusers is enabled.
        """
        if task not in TASKS:
            raise unknown_name("task", task, TASKS)
        if self.transformer.has_foreign_cache:
            raise ConfigError(
                "`score` needs a forward that computes everything; a cache of Diffusers is enabled."
                " Call `pipe.transformer.disable_cache()` first."
            )
        is_causal = self.processor.layout["condition_attention"] == "causal"
        if self.processor.blocks and not is_causal:
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
        device = self._execution_device  # type: ignore[attr-defined]
        if is_causal:
            return self._exact_scores(canvas.to(device), batch_size)
        seeds = draw_row_seeds(generator, canvas.batch_size)
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

    @torch.no_grad()
    def _exact_scores(self, canvas: Canvas, batch_size: int) -> list[LikelihoodEstimate]:
        """The likelihood of each row of a causal model, `batch_size` rows a forward."""
        found: list[LikelihoodEstimate] = []
        for first in range(0, canvas.batch_size, batch_size):
            part = canvas.select_rows(slice(first, first + batch_size))
            sums = causal_nll(self.transformer, part).sum(dim=1).tolist()
            found += [LikelihoodEstimate(nll, 0.0, 1, is_bound=True) for nll in sums]
        return found

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
