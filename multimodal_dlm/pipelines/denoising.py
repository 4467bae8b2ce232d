"""The one denoising loop: canvas in, canvas out, for every task, modality and guidance.

The loop owns what is between the backbone and the scheduler: branches, windows, the translation
between unified ids and columns, and the row generators; forwards with their plans, caches and noise
levels are in `lanes.py`. It knows no modality by name, no mask schedule and no tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import CanvasError, ConfigError
from multimodal_dlm.pipelines.guidance import (
    Branch,
    BranchBuilder,
    combine,
    conditional_only,
    guidance_share,
    scaled,
)
from multimodal_dlm.pipelines.lanes import Forwards
from multimodal_dlm.pipelines.noise_groups import Group, noise_groups, stage_steps
from multimodal_dlm.pipelines.randomness import group_generators

# After a step: (step, timestep, canvas) -> the canvas to go on with, or None to stop here.
StepCallback = Callable[[int, float, Canvas], Canvas | None]
LengthRule = Callable[[Canvas], Canvas]
TimeWindows = Mapping[str, tuple[float, float]]


@dataclass
class GroupRun:
    """A group between opening and closing: what its scheduler remembers and its row generators."""

    group: Group
    state: Any
    generators: list[torch.Generator]
    prediction: Tensor | None = None


# Groups with a free masked position, and in which rows, (batch,).
WaitingRows = list[tuple[GroupRun, Tensor]]


@dataclass(frozen=True)
class DenoisingOutput:
    """What a run of the loop leaves.

    Args:
        canvas: The canvas with every free position written.
        num_forwards: Forwards of all branches; those of one step may share a call of the backbone.
        num_steps: Steps taken.
        is_complete: False when a callback stopped the run, or took tokens back that no step wrote
            again; the rest are then last predictions.
    """

    canvas: Canvas
    num_forwards: int
    num_steps: int
    is_complete: bool


@torch.no_grad()
def denoise(
    transformer: Any,
    scheduler: Any,
    canvas: Canvas,
    *,
    num_inference_steps: int,
    row_seeds: Sequence[int],
    branches: BranchBuilder = conditional_only,
    time_windows: TimeWindows | None = None,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
    guidance_schedule: str = "constant",
    callback: StepCallback | None = None,
    progress_bar: Callable[[int], AbstractContextManager[Any]] | None = None,
    length_rule: LengthRule | None = None,
) -> DenoisingOutput:
    """Write every free masked position of a canvas.

    Args:
        transformer: Backbone; `vocabulary`, `new_cache`, `compute_logits` and a forward.
        scheduler: Reverse process over the columns of one modality.
        canvas: Free positions are masked; everything else stays as it is.
        num_inference_steps: Steps of each window, however many blocks it is written in.
        row_seeds: One seed per row; a row's result depends on its own seed and content only.
        branches: Canvas -> guidance branches, the first one conditional.
        time_windows: (start, stop) in time of some modalities, instead of the scheduler's own.
        guidance_start: Share of the steps after which guidance begins.
        guidance_stop: Share of the steps after which guidance ends.
        guidance_schedule: How strongly it acts in between, one of `guidance.SCHEDULES`.
        callback: Called after each step; returning None stops the run.
        progress_bar: Number of steps -> context manager with `update()`.
        length_rule: Canvas -> Canvas between steps, for rows that change length.

    Raises:
        ConfigError: When there is not one seed per row.
        CanvasError: When groups with free positions differ between rows.
    """
    if len(row_seeds) != canvas.batch_size:
        raise ConfigError(
            f"`row_seeds` must have one entry per row; got {len(row_seeds)} for"
            f" {canvas.batch_size} rows."
        )
    loop = _Loop(transformer, scheduler, canvas, branches, time_windows or {})
    stages = noise_groups(canvas, transformer.vocabulary.modalities)
    generators = iter(group_generators(row_seeds, sum(len(stage) for stage in stages)))
    counts = stage_steps(stages, num_inference_steps)
    with progress_bar(sum(counts)) if progress_bar else nullcontext() as bar:
        for stage, count in zip(stages, counts, strict=True):
            scheduler.set_timesteps(count, device=canvas.device)
            loop.open(stage, [next(generators) for _ in stage])
            for index, timestep in enumerate(scheduler.timesteps.tolist()):
                waiting = loop.waiting_rows()
                if not waiting:
                    break
                if bar is not None:
                    bar.update()
                share = guidance_share(
                    index, count, guidance_start, guidance_stop, guidance_schedule
                )
                if not loop.step(timestep, share, waiting):
                    continue
                if callback is not None:
                    changed = callback(loop.num_steps - 1, timestep, loop.canvas)
                    if changed is None:
                        return loop.stop()
                    loop.accept(changed)
                if length_rule is not None:
                    loop.reshape(length_rule(loop.canvas))
    # A callback may have taken back what no later step writes.
    return loop.stop() if loop.has_masks() else loop.output(is_complete=True)


class _Loop:
    """State of one run: the canvas, its branches and the open groups."""

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        canvas: Canvas,
        builder: BranchBuilder,
        time_windows: TimeWindows,
    ) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self.vocabulary = transformer.vocabulary
        self.canvas = canvas
        self.builder = builder
        self.time_windows = time_windows
        self.forwards = Forwards(transformer, builder(canvas))
        self.runs: list[GroupRun] = []
        self.num_steps = 0
        # Groups of the present canvas, once it has changed shape since the stages were found.
        self._moved: dict[tuple[int, int], Group] = {}
        self._waiting: tuple[Canvas, Tensor] | None = None

    def open(self, stage: Sequence[Group], generators: Sequence[list[torch.Generator]]) -> None:
        """Begin the runs of the groups of one stage."""
        present = [self._moved.get((group.window, group.order), group) for group in stage]
        self.runs = [
            GroupRun(group, self._begin(group), rows)
            for group, rows in zip(present, generators, strict=True)
        ]
        for run in self.runs:
            self._fill_ended(run)

    def _groups(self) -> dict[tuple[int, int], Group]:
        """Groups of the canvas by window and order."""
        stages = noise_groups(self.canvas, self.vocabulary.modalities)
        return {(group.window, group.order): group for stage in stages for group in stage}

    def _begin(self, group: Group) -> Any:
        start, stop = self.time_windows.get(group.modality, (None, None))
        sample, is_free = self._sample(group)
        first = self.canvas.window_slice(group.window).start
        rest = slice(first + group.stop, self.canvas.window_slice(group.window).stop)
        return self.scheduler.begin(
            sample,
            is_free,
            group.modality,
            start=start,
            stop=stop,
            ends_window=not bool(self.canvas.is_free[:, rest].any()),
        )

    def _fill_ended(self, run: GroupRun) -> None:
        """Fill a block and those after it for free in rows whose window ended in an earlier one."""
        group, settings = run.group, run.state.settings
        if not group.start or settings.eos_column is None or settings.fill_column is None:
            return
        window = self.canvas.window_slice(group.window)
        part = slice(window.start + group.start, window.stop)
        before = self.canvas.input_ids[:, window.start : part.start]
        first = self.vocabulary.columns(group.modality).start
        has_ended = (before == first + settings.eos_column).any(dim=1, keepdim=True)
        is_masked = self.vocabulary.is_masked(self.canvas.input_ids[:, part])
        is_filled = is_masked & self.canvas.is_free[:, part] & has_ended
        if bool(is_filled.any()):
            ids = self.canvas.input_ids.clone()
            ids[:, part] = ids[:, part].masked_fill(is_filled, first + settings.fill_column)
            self.canvas = self.canvas.replace(input_ids=ids)
            self.forwards.write(self.canvas, [group.window])

    def _sample(self, group: Group) -> tuple[Tensor, Tensor]:
        """Columns (padding counts as a frozen mask) and free flags of a group."""
        part = group.columns(self.canvas)
        mask = self.vocabulary.mask_token_id(group.modality)
        ids = self.canvas.input_ids[:, part].masked_fill(self.canvas.is_padding[:, part], mask)
        return self.vocabulary.to_columns(ids, group.modality), self.canvas.is_free[:, part]

    @property
    def is_waiting(self) -> Bool[Tensor, "batch length"]:
        """Free masked positions of the canvas, found once for each canvas."""
        if self._waiting is None or self._waiting[0] is not self.canvas:
            is_masked = self.vocabulary.is_masked(self.canvas.input_ids)
            self._waiting = (self.canvas, is_masked & self.canvas.is_free)
        return self._waiting[1]

    def waiting_rows(self) -> WaitingRows:
        """Open groups with a waiting position, and the rows that have one; empty once all close."""
        rows = [
            (run, self.is_waiting[:, run.group.columns(self.canvas)].any(dim=1))
            for run in self.runs
        ]
        return [(run, is_open) for run, is_open in rows if bool(is_open.any())]

    def has_masks(self) -> bool:
        """True when a free position is masked."""
        return bool(self.is_waiting.any())

    def step(self, timestep: float, share: float, waiting: WaitingRows) -> bool:
        """The forwards of all branches, then one scheduler step per waiting group.

        Returns:
            False when no group's time window has begun, so that nothing was computed.
        """
        begun = [pair for pair in waiting if self.scheduler.has_begun(timestep, pair[0].state)]
        if not begun:
            return False
        runs = [run for run, _ in begun]
        branches = [
            branch
            for branch in scaled(self.forwards.branches, share)
            if any(branch.serves(run.group.window) for run in runs)
        ]
        # A row that has finished its block stays for the next: what is kept of it would be lost.
        rows = self.is_waiting.any(dim=1).nonzero().flatten()
        self.forwards(branches, rows, [run.group for run in runs])
        ids = self.canvas.input_ids.clone()
        for run in runs:
            serving = [branch for branch in branches if branch.serves(run.group.window)]
            ids[:, run.group.columns(self.canvas)] = self._write(run, serving, timestep)
        self.num_steps += 1
        self.canvas = self.canvas.replace(input_ids=ids)
        self.forwards.write(self.canvas, {run.group.window for run in runs})
        return True

    def _write(
        self, run: GroupRun, branches: Sequence[Branch], timestep: float
    ) -> Int[Tensor, "batch positions"]:
        """Unified ids of a group after one scheduler step."""
        group = run.group
        part = group.columns(self.canvas)
        logits = self._logits(group, branches, self.is_waiting[:, part])
        quality = self.forwards.lane(branches[0]).token_quality(branches[0], group)
        sample, is_free = self._sample(group)
        stepped = self.scheduler.step_masked(
            combine(logits, {branch.name: branch.weight for branch in branches}),
            timestep,
            sample,
            state=run.state,
            is_free=is_free,
            generator=run.generators,
            token_quality=quality,
            allowed=self.vocabulary.allowed_columns(self.canvas.input_ids[:, part], group.modality),
        )
        run.state = stepped.state
        run.prediction = stepped.pred_original_sample
        return self._merge(part, is_free, stepped.prev_sample, group.modality)

    def _logits(
        self, group: Group, branches: Sequence[Branch], is_picked: Bool[Tensor, "batch positions"]
    ) -> dict[str, Float[Tensor, "picked columns"]]:
        """Logits of each branch at some positions of a group, from the last forwards."""
        rows, positions = is_picked.nonzero(as_tuple=True)
        return {
            branch.name: self.transformer.compute_logits(
                self.forwards.lane(branch).states(branch, group, rows, positions), group.modality
            )
            for branch in branches
        }

    def _merge(self, part: slice, is_written: Tensor, columns: Tensor, modality: str) -> Tensor:
        """Unified ids of a part, some taken from columns and the rest kept."""
        ids = self.vocabulary.from_columns(columns, modality)
        return torch.where(is_written, ids, self.canvas.input_ids[:, part])

    def accept(self, canvas: Canvas) -> None:
        """Go on with the canvas a callback returned.

        Raises:
            CanvasError: When it changed anything but the ids of free positions.
        """
        if canvas is self.canvas:
            return
        changed = canvas.input_ids != self.canvas.input_ids
        if bool((changed & ~self.canvas.is_free).any()):
            raise CanvasError(
                "A callback may change `input_ids` at free positions only; it changed a known"
                " token. Build another canvas for that."
            )
        self.canvas = canvas.validate(self.vocabulary)
        self.forwards.write(canvas, canvas.free_windows())

    def reshape(self, canvas: Canvas) -> None:
        """Go on with a canvas of another shape: branches, plans, caches and groups begin anew."""
        if canvas is self.canvas:
            return
        self.canvas = canvas
        self.forwards = Forwards(self.transformer, self.builder(canvas), self.forwards.num_forwards)
        self._moved = self._groups()
        for run in self.runs:
            group = self._moved.get((run.group.window, run.group.order))
            if group is not None:
                run.group, run.state, run.prediction = group, self._begin(group), None

    def stop(self) -> DenoisingOutput:
        """End early: free masks take the last prediction, or the likeliest token without one."""
        predictions = {run.group: run.prediction for run in self.runs}
        ids = self.canvas.input_ids.clone()
        first = self.forwards.branches[0]
        is_computed = False  # Only where there is no prediction.
        for group in self._groups().values():
            part = group.columns(self.canvas)
            sample, is_free = self._sample(group)
            is_masked = is_free & (sample == self.vocabulary.num_columns(group.modality))
            if not bool(is_masked.any()):
                continue
            columns = predictions.get(group)
            if columns is None:
                if not is_computed:
                    self.forwards([first], torch.arange(len(ids), device=ids.device))
                    is_computed = True
                logits = self._logits(group, [first], is_masked)[first.name]
                columns = sample.masked_scatter(is_masked, logits.argmax(dim=-1))
            ids[:, part] = self._merge(part, is_masked, columns, group.modality)
        self.canvas = self.canvas.replace(input_ids=ids)
        return self.output(is_complete=False)

    def output(self, *, is_complete: bool) -> DenoisingOutput:
        """The result of the run."""
        return DenoisingOutput(self.canvas, self.forwards.num_forwards, self.num_steps, is_complete)
