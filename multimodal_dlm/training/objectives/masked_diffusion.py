"""Masked (absorbing) diffusion by exact counts.

In every free window of L positions, k = ceil(u L) of them are masked, u uniform, every subset
equally likely; NELBO_row = (L / k) x the sum of cross-entropies at the k positions, an unbiased
estimate of the any-order bound (Uria et al. 2014, arXiv 1310.1757; Ou et al. 2024, arXiv
2406.03736, Eq. 14), with less variance than Bernoulli masks weighted by 1 / t.

A window written in blocks is a chain of such bounds, one a block, given the clean blocks before it
(Arriola et al. 2025, arXiv 2503.09573, Eq. 7): each block draws its own count, and one forward
holds noisy blocks and clean copies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.diffusion.mask_schedules import MaskSchedule, get_mask_schedule
from multimodal_dlm.diffusion.masking import exact_count_mask, rectangle_mask
from multimodal_dlm.diffusion.timesteps import (
    counts_from_uniforms,
    mean_scheduled_count,
    scheduled_counts,
    stratified_uniforms,
)
from multimodal_dlm.errors import ConfigError, nearest_match, unknown_name
from multimodal_dlm.tasks import TASKS
from multimodal_dlm.training.objectives.base import Generators, ObjectiveOutput, target_nll
from multimodal_dlm.training.objectives.canvas_objective import (
    CanvasObjective,
    density_terms,
    nelbo_terms,
    noise_terms,
    num_free_windows,
)
from multimodal_dlm.training.packing import Packing, canvas_states
from multimodal_dlm.vocabulary import UnifiedVocabulary

MASK_WEIGHTINGS = ("bound", "flat")
# The uniform numbers of a row's blocks are this far apart, modulo 1: each is uniform, all spread.
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Corruption:
    """A corrupted canvas and how its loss is weighted.

    Args:
        canvas: Targets replaced by their modality's mask.
        is_target: Positions that carry loss.
        weight: The bound's at each target, 0 elsewhere: L / k of the window, over L p(k) where
            counts are not uniform.
        flat_weight: L over the mean count at each target, 0 elsewhere: 2 L / (L + 1) where counts
            are uniform.
        is_apart: Rows whose loss is no bound of the data: masked by a rectangle instead of an exact
            count, or with masks in what they are given.
    """

    canvas: Canvas
    is_target: Bool[Tensor, "batch length"]
    weight: Float[Tensor, "batch length"]
    flat_weight: Float[Tensor, "batch length"]
    is_apart: Bool[Tensor, " batch"]


class MaskedDiffusion(CanvasObjective):
    """Exact-count masked diffusion over any canvas.

    Args:
        loss_weights: Weight of each modality by name; 1 where none is given.
        task_weights: Weight of the rows of each task by name; 1 where none is given.
        hole_share: Share of rows whose only free window is a grid that get one rectangular hole
            instead (practice for inpainting; left out of the reported bounds). 0 where grids are
            written in blocks, as under `condition_attention: causal`.
        mask_weighting: `bound` or `flat` for each modality by name; `bound` where none is given.
            `bound` is the NELBO's L / k; `flat` gives each masked token the same 2 L / (L + 1) (L
            over the mean count), the same sum in the mean. A picture's last few tokens then no
            longer weigh as much as all of it, and gradients vary less (You et al. 2025, arXiv
            2503.07197, w(t) = 1). The optimum is the same, the reported bounds stay bounds.
        mask_schedule: By modality, the mask schedule whose rate at a uniform time sets the share of
            a window that is masked, as `{image: cosine}` or `{image: {name: polynomial, power:
            2}}`; uniform shares where none is given. With `cosine` pictures are seen as its
            sampler sees them, mostly masks, where the text has to say what they are (Chang et al.
            2022, arXiv 2202.04200). The bound weighs by 1 / p(k) against it and stays a bound;
            `flat` does not, so it also shifts the loss to high noise.
        condition_noise: By task, the largest share of each known window's tokens that is masked
            while training, without loss: the count is uniform from 0 to it, one draw for all known
            windows of a row (of `vqa` picture and question). A picture to be named is then never
            twice the same. Rows with such masks are left out of the reported bounds.
        num_noise_bins: Noise levels reported separately.
    """

    def __init__(
        self,
        *,
        loss_weights: Mapping[str, float] | None = None,
        task_weights: Mapping[str, float] | None = None,
        hole_share: float = 0.0,
        mask_weighting: Mapping[str, str] | None = None,
        mask_schedule: Mapping[str, str | Mapping[str, Any]] | None = None,
        condition_noise: Mapping[str, float] | None = None,
        num_noise_bins: int = 4,
    ) -> None:
        super().__init__(loss_weights=loss_weights, task_weights=task_weights)
        self.mask_weighting = dict(mask_weighting or {})
        for modality, weighting in self.mask_weighting.items():
            if weighting not in MASK_WEIGHTINGS:
                raise ConfigError(
                    f"`mask_weighting.{modality}` must be one of {', '.join(MASK_WEIGHTINGS)}; got"
                    f" {weighting!r}.{nearest_match(weighting, MASK_WEIGHTINGS)}"
                )
        self.mask_schedule = _schedules(mask_schedule or {})
        if not 0.0 <= hole_share <= 1.0:
            raise ConfigError(f"`hole_share` must lie in [0, 1]; got {hole_share}. Use 0.1.")
        self.hole_share = hole_share
        self.condition_noise = dict(condition_noise or {})
        for task, share in self.condition_noise.items():
            if task not in TASKS:
                raise unknown_name("task in `condition_noise`", task, TASKS)
            if not 0.0 <= share <= 1.0:
                raise ConfigError(
                    f"`condition_noise.{task}` must lie in [0, 1]; got {share}. Use 0.3."
                )
        self.num_noise_bins = num_noise_bins

    def __call__(
        self,
        model: Any,
        inputs: Canvas,
        *,
        generator: Generators,
        teacher: Any = None,
        uniforms: Mapping[int, Float[Tensor, " batch"]] | None = None,
        denominators: Mapping[int, int] | None = None,
        tasks: Sequence[str] = (),
        draws: Sequence[float] = (),
        row_share: float = 1.0,
        packing: Packing | None = None,
        is_scheduled: bool = True,
    ) -> ObjectiveOutput:
        """One forward on one corruption of a clean canvas.

        Args:
            model: Backbone; its `vocabulary` names masks and columns.
            inputs: Clean canvas; `is_free` is what may be masked.
            generator: One for the batch, or one for each row.
            teacher: Unused: the targets are the data.
            uniforms: Window id -> one number in [0, 1) a row that sets its counts; None to draw.
            denominators: Free positions of each modality index in the global batch.
            tasks: Task of each row, for its weight, its condition noise and the report.
            draws: One number in [0, 1) a row that decides about holes and condition noise; none
                without.
            row_share: Rows of this micro-batch over those of the global batch.
            packing: How rows share the rows of the forward pass.
            is_scheduled: Whether counts follow `mask_schedule`; uniform ones otherwise.
        """
        del teacher
        vocabulary = model.vocabulary
        corrupted = self.corrupt(
            inputs,
            vocabulary,
            generator=generator,
            uniforms=uniforms,
            draws=draws,
            tasks=tasks,
            is_scheduled=is_scheduled,
        )
        noisy = corrupted.canvas
        levels = noise_levels(noisy, vocabulary)
        output = canvas_states(model, noisy, levels, packing, clean=inputs)
        nll = target_nll(model, output.hidden_states, inputs, corrupted.is_target)
        nelbo = nll * corrupted.weight
        weight = self._loss_weight(corrupted, vocabulary)
        loss = self.weighted_loss(nll * weight, inputs, vocabulary, denominators, tasks)
        if output.auxiliary_loss is not None:
            loss = loss + row_share * output.auxiliary_loss
        is_bound = (num_free_windows(inputs) <= 1) & ~corrupted.is_apart
        terms = nelbo_terms(nelbo, inputs, vocabulary, is_bound=is_bound, tasks=tasks)
        terms |= noise_terms(
            nll, levels, corrupted.is_target, inputs, vocabulary, self.num_noise_bins
        )
        terms |= density_terms(corrupted.weight, corrupted.is_target, inputs)
        return ObjectiveOutput(loss, terms, int(corrupted.is_target.sum()), is_bound)

    def grid(
        self, contexts: Sequence[dict[str, Any]], num_levels: int
    ) -> list[list[dict[str, Any]]]:
        """Those of every canvas objective, with uniform counts whatever `mask_schedule` says.

        So held-out levels are equal bands of noise, the same in runs with different schedules.
        """
        levels = super().grid(contexts, num_levels)
        return [[{**context, "is_scheduled": False} for context in level] for level in levels]

    def corrupt(
        self,
        canvas: Canvas,
        vocabulary: UnifiedVocabulary,
        *,
        generator: Generators,
        uniforms: Mapping[int, Float[Tensor, " batch"]] | None = None,
        draws: Sequence[float] = (),
        tasks: Sequence[str] = (),
        is_scheduled: bool = True,
    ) -> Corruption:
        """Mask an exact count of every block of a free window, or one rectangle of a grid.

        What is known keeps its tokens, but for the `condition_noise` of a row's task.

        Raises:
            ConfigError: When rows may get holes and a grid is written in several blocks, or
                `mask_schedule` names a modality that there is not.
        """
        is_target = torch.zeros_like(canvas.is_free)
        weight = torch.zeros(canvas.is_free.shape, device=canvas.device)
        flat_weight = torch.zeros_like(weight)
        input_ids = canvas.input_ids.clone()
        wants_hole = torch.zeros(canvas.batch_size, dtype=torch.bool)
        if len(draws):
            wants_hole = torch.tensor([draw < self.hole_share for draw in draws])
        wants_hole = wants_hole.to(canvas.device) & (num_free_windows(canvas) == 1)
        has_hole = torch.zeros(canvas.batch_size, dtype=torch.bool, device=canvas.device)
        for modality in self.mask_schedule:
            if modality not in vocabulary.modalities:
                raise unknown_name("modality in `mask_schedule`", modality, vocabulary.modalities)
        for window in canvas.free_windows():
            part = canvas.window_slice(window)
            modality = vocabulary.modalities[canvas.window_modality(window)]
            u = uniforms[window] if uniforms is not None else _draw(canvas.batch_size, generator)
            u = u.to(canvas.device)
            blocks = list(_blocks(canvas, part))
            if len(draws) and self.hole_share > 0 and len(blocks) > 1:
                _check_one_piece(canvas, part, self.hole_share)
            for is_free in blocks:
                lengths = is_free.sum(dim=1)
                schedule = self.mask_schedule.get(modality) if is_scheduled else None
                wanted, bound, flat = _counts(u, lengths, schedule)
                masked = _masks(is_free, wanted, generator)
                if bool(wants_hole.any()):
                    masked, holed = _holes(canvas, part, masked, wants_hole, generator)
                    has_hole |= holed
                    # A hole has the size of its rectangle: no schedule drew it.
                    bound = bound.masked_fill(holed, 1.0)
                    flat = torch.where(holed, 2 * lengths / (lengths + 1), flat)
                counts = masked.sum(dim=1)
                is_target[:, part] |= masked
                weight[:, part] += masked * (bound * lengths / counts.clamp(min=1))[:, None]
                flat_weight[:, part] += masked * flat[:, None]
                u = (u + GOLDEN_RATIO) % 1.0
            mask = vocabulary.mask_token_id(modality)
            input_ids[:, part] = input_ids[:, part].masked_fill(is_target[:, part], mask)
        blurred = self._blurred(canvas, vocabulary, draws, tasks, generator)
        for window in canvas.windows() if bool(blurred.any()) else ():
            part = canvas.window_slice(window)
            mask = vocabulary.mask_token_id(vocabulary.modalities[canvas.window_modality(window)])
            input_ids[:, part] = input_ids[:, part].masked_fill(blurred[:, part], mask)
        noisy = canvas.replace(input_ids=input_ids)
        is_apart = has_hole | blurred.any(dim=1)
        return Corruption(noisy, is_target, weight, flat_weight, is_apart)

    def _blurred(
        self,
        canvas: Canvas,
        vocabulary: UnifiedVocabulary,
        draws: Sequence[float],
        tasks: Sequence[str],
        generator: Generators,
    ) -> Bool[Tensor, "batch length"]:
        """Known tokens that are masked: in the windows of which a row may write nothing."""
        blurred = torch.zeros_like(canvas.is_free)
        noise = [self.condition_noise.get(task, 0.0) for task in tasks]
        if not len(draws) or not any(noise):
            return blurred
        largest = torch.tensor(noise, dtype=torch.float64, device=canvas.device)
        # What is left of a number that said whether there is a hole is uniform again.
        left = [
            draw / self.hole_share
            if draw < self.hole_share
            else (draw - self.hole_share) / (1 - self.hole_share)
            for draw in draws
        ]
        share = torch.tensor(left, dtype=torch.float64, device=canvas.device)
        for window in canvas.windows():
            part = canvas.window_slice(window)
            is_known = ~canvas.is_padding[:, part] & ~vocabulary.is_masked(
                canvas.input_ids[:, part]
            )
            is_known &= ~canvas.is_free[:, part].any(dim=1, keepdim=True) & (largest > 0)[:, None]
            counts = share * ((largest * is_known.sum(dim=1)).floor() + 1)
            blurred[:, part] = _masks(is_known, counts.long(), generator)
        return blurred

    def _loss_weight(
        self, corrupted: Corruption, vocabulary: UnifiedVocabulary
    ) -> Float[Tensor, "batch length"]:
        """The weight of each target's cross-entropy in the loss."""
        weight = corrupted.weight
        for modality, weighting in self.mask_weighting.items():
            if weighting == "flat":
                is_own = corrupted.canvas.modality_ids == vocabulary.modality_id(modality)
                weight = torch.where(is_own, corrupted.flat_weight, weight)
        return weight


def _blocks(canvas: Canvas, part: slice) -> Iterator[Bool[Tensor, "batch length"]]:
    """The free positions of a window, block after block; the blocks of each row are its own."""
    is_free, order = canvas.is_free[:, part], canvas.order[:, part]
    beyond = int(order.max()) + 1
    number = order - order.masked_fill(~is_free, beyond).amin(dim=1, keepdim=True)
    for block in range(int(number.masked_fill(~is_free, 0).max()) + 1):
        yield is_free & (number == block)


def _schedules(entries: Any) -> dict[str, MaskSchedule]:
    """The mask schedule of each modality, from its name or from its name and options."""
    remedy = "Write `{image: cosine}`, or `{image: {name: polynomial, power: 2}}`."
    if not isinstance(entries, Mapping):
        raise ConfigError(f"`mask_schedule` must go by modality; got {entries!r}. {remedy}")
    found = {}
    for modality, entry in entries.items():
        options = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
            raise ConfigError(
                f"`mask_schedule.{modality}` must be a name, or a mapping that has a `name`; got"
                f" {entry!r}. {remedy}"
            )
        try:
            found[modality] = get_mask_schedule(**options)
        except ConfigError as error:
            raise ConfigError(f"`mask_schedule.{modality}`: {error}") from error
    return found


def _counts(
    u: Float[Tensor, " batch"], lengths: Int[Tensor, " batch"], schedule: MaskSchedule | None
) -> tuple[Int[Tensor, " batch"], Tensor, Tensor]:
    """Mask counts k, 1 / (L p(k)), and the weight that all targets may share: L over the mean k."""
    if schedule is None:
        flat = 2 * lengths / (lengths + 1)
        return counts_from_uniforms(u, lengths), torch.ones_like(flat), flat
    counts, likely = scheduled_counts(u, lengths, schedule)
    size = lengths.clamp(min=1)
    flat = lengths / mean_scheduled_count(size, schedule)
    return counts, (1 / (size * likely)).float(), flat.float()


def _draw(batch: int, generator: Generators) -> Float[Tensor, " batch"]:
    """Numbers that set the counts: stratified with one generator, independent with one a row."""
    if isinstance(generator, torch.Generator):
        return stratified_uniforms(batch, generator=generator)
    draws = [torch.rand(1, generator=row, dtype=torch.float64) for row in generator]
    return torch.cat(draws)


def _masks(
    is_free: Bool[Tensor, "batch length"], counts: Int[Tensor, " batch"], generator: Generators
) -> Bool[Tensor, "batch length"]:
    """Exact-count masks; with a generator a row, a row's mask does not depend on its padding."""
    if isinstance(generator, torch.Generator):
        return exact_count_mask(is_free, counts, generator=generator)
    masked = torch.zeros_like(is_free)
    for row, draw in enumerate(generator):
        columns = is_free[row].nonzero().flatten()
        if len(columns):
            chosen = exact_count_mask(
                is_free[row : row + 1, columns], counts[row : row + 1], generator=draw
            )
            masked[row, columns] = chosen[0]
    return masked


def _grid(canvas: Canvas, part: slice) -> tuple[int, int]:
    """Height and width of a window in tokens; 1 and 1 for a text."""
    height, width = canvas.position_ids[:, part, -2:].amax(dim=(0, 1)).tolist()
    return height + 1, width + 1


def _check_one_piece(canvas: Canvas, part: slice, hole_share: float) -> None:
    """Refuse holes in grids that are written in blocks: a hole would lie across them."""
    if _grid(canvas, part) != (1, 1):
        raise ConfigError(
            "`hole_share` above 0 needs grids that are written in one piece; got"
            f" {hole_share} and a grid in blocks (`condition_attention: causal`). Set it to 0, or"
            " `model.condition_attention` to `prefix`."
        )


def _holes(
    canvas: Canvas,
    part: slice,
    masked: Bool[Tensor, "batch length"],
    wants_hole: Bool[Tensor, " batch"],
    generator: Generators,
) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, " batch"]]:
    """Replace the masks of some rows by rectangles, in a window that is one free grid.

    Returns:
        The masks, and the rows that were replaced.
    """
    axes = canvas.position_ids[:, part, -2:]
    height, width = _grid(canvas, part)
    is_grid = canvas.is_free[:, part].all(dim=1) & (height * width > 1)
    rows = (wants_hole & is_grid).nonzero().flatten()
    masked, has_hole = masked.clone(), torch.zeros_like(wants_hole)
    for row in rows.tolist():
        draw = generator if isinstance(generator, torch.Generator) else generator[row]
        hole = rectangle_mask(1, (height, width), generator=draw)[0].to(masked.device)
        masked[row] = hole[axes[row, :, 0], axes[row, :, 1]]
        has_hole[row] = True
    return masked, has_hole
