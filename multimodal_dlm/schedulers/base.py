"""The contract of all schedulers: configuration, times, counts, randomness and checks.

A subclass says in `_reverse` which masked positions become which columns; everything that is the
same for all of them is here. A scheduler keeps configuration and timesteps only: whatever belongs
to one run is in the `SchedulerState` that `begin` opens and `step` requires.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.schedulers.checks import (
    allowed_at,
    as_row_generators,
    check_length_rule,
    check_logits,
    check_shape,
    check_tensors,
)
from multimodal_dlm.schedulers.proposal import Proposal, propose, restrict
from multimodal_dlm.schedulers.settings import ModalitySettings
from multimodal_dlm.schedulers.step_plan import plan_steps
from multimodal_dlm.schedulers.step_times import StepTimes


@dataclass(frozen=True)
class SchedulerState:
    """What one run of one noise group remembers between its steps.

    Args:
        modality: Name of the modality; an entry of `config.modalities`.
        settings: Options of that modality, with the time window of this group.
        initial_sample: Columns the group began with; the counts of the plan are its masked free
            positions.
        memory: Tensors (batch, seq, ...) a subclass or its commit rule kept at the last step.
        ends_window: No later group goes on with the window, so its text must end here.
    """

    modality: str
    settings: ModalitySettings
    initial_sample: Int[Tensor, "batch seq"]
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ends_window: bool = True

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "SchedulerState":
        """A copy with every tensor, all (batch, ...), moved as the canvas moved."""
        memory = {name: function(tensor) for name, tensor in self.memory.items()}
        return replace(self, initial_sample=function(self.initial_sample), memory=memory)


@dataclass
class DiscreteSchedulerOutput(BaseOutput):
    """What `step` gives back; all tensors are new.

    Args:
        prev_sample: Columns after the step; V where still masked.
        pred_original_sample: Columns with every masked free position filled by its drawn token.
        committed: Positions that were masked before the step and are known after it.
        revoked: Positions that were known before the step and are masked after it.
        pred_logits: Shaped logits the tokens were drawn from, at masked free positions; elsewhere
            the logits as given. Columns that could not be drawn hold -inf.
        state: The run's record, to be handed to the next step.
    """

    prev_sample: Int[Tensor, "batch seq"]
    pred_original_sample: Int[Tensor, "batch seq"]
    committed: Bool[Tensor, "batch seq"]
    revoked: Bool[Tensor, "batch seq"]
    pred_logits: Float[Tensor, "batch seq columns"]
    state: SchedulerState


@dataclass(frozen=True)
class MaskedStepOutput:
    """What `step_masked` gives back: `DiscreteSchedulerOutput` without what no loop reads."""

    prev_sample: Int[Tensor, "batch seq"]
    pred_original_sample: Int[Tensor, "batch seq"]
    state: SchedulerState


@dataclass(frozen=True)
class StepInput:
    """One step as a subclass sees it.

    Args:
        logits: Guided logits of the modality's columns at the masked positions, in the order of
            `is_masked`, float32 or float64.
        sample: Columns; V where masked.
        is_masked: Masked and free: the positions this step may write.
        is_free: Positions the run may write.
        allowed: Columns each masked position may take, in the same order; None for all.
        uniforms: Two float64 numbers in [0, 1) per position, for its token and for its place in the
            order; rows that are finished hold 0.5.
        num_left: Masked positions the plan leaves in each row, fewer than now in unfinished rows.
        times: Place of the step in the group's time window.
        settings: Options of the modality.
        memory: What the last step left in `StepResult.memory`.
        ends_window: No later group goes on with the window.
    """

    logits: Float[Tensor, "masked columns"]
    sample: Int[Tensor, "batch seq"]
    is_masked: Bool[Tensor, "batch seq"]
    is_free: Bool[Tensor, "batch seq"]
    allowed: Bool[Tensor, "masked columns"] | None
    uniforms: Float[Tensor, "batch seq 2"]
    num_left: Int[Tensor, " batch"]
    times: StepTimes
    settings: ModalitySettings
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ends_window: bool = True

    @property
    def mask_column(self) -> int:
        """Number of columns V, which is also the column of the mask."""
        return self.logits.shape[-1]

    @property
    def possible(self) -> Float[Tensor, "masked columns"]:
        """The logits with -inf where a column is not allowed."""
        return restrict(self.logits, self.allowed)

    def propose(self) -> Proposal:
        """A token for every masked position, among all allowed columns."""
        possible = self.possible
        return propose(
            self.sample,
            self.is_masked,
            possible,
            possible,
            settings=self.settings,
            uniforms=self.uniforms,
        )


@dataclass(frozen=True)
class StepResult:
    """What a subclass decides: columns after the step, and the drawn tokens they came from.

    `memory` holds tensors (batch, seq, ...) that the next step of the same run will see.
    """

    prev_sample: Int[Tensor, "batch seq"]
    proposal: Proposal
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class DiscreteScheduler(SchedulerMixin, ConfigMixin):
    """Base of the reverse processes.

    Subclasses take the keyword `modalities` (name -> options of `ModalitySettings`; None for the
    preset) through `@register_to_config`, pass it to `_configure`, and implement `_reverse`.
    """

    order = 1

    def _configure(
        self, modalities: Mapping[str, Any] | None, preset: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Check the options, complete them with their defaults, and store them in the config."""
        chosen = preset if modalities is None else modalities
        if not isinstance(chosen, Mapping) or not chosen:
            raise ConfigError(
                "`modalities` must be a dictionary, name -> options, with one entry or more; got"
                f' {chosen!r}. Use {{"text": {{}}}} or leave it out.'
            )
        self._settings = {
            name: ModalitySettings.from_options(name, options) for name, options in chosen.items()
        }
        self.register_to_config(
            modalities={name: entry.to_options() for name, entry in self._settings.items()}
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Set `timesteps` to 1 - i / num_inference_steps, i = 0..num_inference_steps - 1.

        Raises:
            ConfigError: When the number is not a whole number, 1 or more.
        """
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ConfigError(
                "`num_inference_steps` must be a whole number, 1 or more; got"
                f" {num_inference_steps!r}. Use 1 to commit everything in one step."
            )
        self.num_inference_steps = num_inference_steps
        steps = torch.arange(num_inference_steps, dtype=torch.float64)
        times = 1.0 - steps / num_inference_steps
        self.timesteps = times.to(dtype=torch.float32, device=device)

    def begin(
        self,
        sample: Tensor,
        is_free: Tensor,
        modality: str,
        *,
        start: float | None = None,
        stop: float | None = None,
        ends_window: bool = True,
    ) -> SchedulerState:
        """Open the run of one noise group.

        Args:
            sample: Columns of the group, (batch, seq); V where masked.
            is_free: Positions the run may write, (batch, seq).
            modality: Entry of `config.modalities` to follow.
            start: Time at which this group begins, when it is not the modality's (blocks, chains).
            stop: Time at which this group ends, when it is not the modality's.
            ends_window: False where a later block goes on with the window.

        Raises:
            ConfigError: When the modality has no entry, the shapes differ, or the time window is
                empty.
        """
        if modality not in self._settings:
            raise unknown_name("modality", modality, self._settings)
        check_shape("is_free", is_free, tuple(sample.shape))
        settings = self._settings[modality].between(start, stop)
        return SchedulerState(
            modality=modality,
            settings=settings,
            initial_sample=sample.clone(),
            ends_window=ends_window,
        )

    def has_begun(self, timestep: float | Tensor, state: SchedulerState) -> bool:
        """Whether a step at this timestep commits anything; if not, the loop may skip it."""
        return self._times(timestep, state.settings).has_begun

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        state: SchedulerState,
        is_free: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        token_quality: Tensor | None = None,
        allowed: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple[Any, ...]:
        """Commit some of the masked free positions.

        Args:
            model_output: Guided logits (batch, seq, V) of the modality's V columns; there is no
                mask column. Any float type; the work is done in float32 or better.
            timestep: One of `timesteps`.
            sample: Columns (batch, seq), 0..V-1 where known, V where masked. A position that is
                neither free nor known (padding, a frozen mask) holds V and is never touched.
            state: What `begin` or the last step returned.
            is_free: Positions the run may write, bool (batch, seq); constant during the run.
            generator: One generator per row. A row draws for all its free positions at each step
                while it is unfinished, so its tokens do not depend on the other rows. None is
                enough where nothing is drawn (temperature and choice temperature 0).
            token_quality: Estimated probability that a known token is right, (batch, seq); used
                by self-correcting schedulers.
            allowed: Columns each position may take, bool, broadcastable to (batch, seq, V); None
                for all.
            return_dict: False returns the fields as a tuple.

        Raises:
            ConfigError: When shapes contradict, the timestep is not one of `timesteps`, a masked
                position has no allowed column, or generators are missing.
        """
        check_tensors(model_output, sample, is_free)
        logits = model_output if model_output.dtype == torch.float64 else model_output.float()
        mask_column = logits.shape[-1]
        is_masked = is_free & (sample == mask_column)
        result = self._advance(
            logits[is_masked],
            timestep,
            sample,
            is_masked=is_masked,
            state=state,
            is_free=is_free,
            generator=generator,
            token_quality=token_quality,
            allowed=allowed,
        )
        pred_logits = logits.clone()
        if result is not None:
            pred_logits[result.proposal.is_masked] = result.proposal.shaped_logits
        taken = _taken(result, sample, state)
        was_masked, is_still_masked = sample == mask_column, taken.prev_sample == mask_column
        output = DiscreteSchedulerOutput(
            prev_sample=taken.prev_sample,
            pred_original_sample=taken.pred_original_sample,
            committed=was_masked & ~is_still_masked,
            revoked=~was_masked & is_still_masked,
            pred_logits=pred_logits,
            state=taken.state,
        )
        return output if return_dict else output.to_tuple()

    def step_masked(
        self,
        logits: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        state: SchedulerState,
        is_free: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        token_quality: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> MaskedStepOutput:
        """`step` for a loop that computes logits of the masked free positions only.

        Args:
            logits: (masked, V), in the order of `is_free & (sample == V)`.
            timestep: As for `step`, as are the others.
            sample: Columns (batch, seq).
            state: What `begin` or the last step returned.
            is_free: Positions the run may write.
            generator: One generator per row.
            token_quality: Estimated probability that a known token is right.
            allowed: Columns each position may take, broadcastable to (batch, seq, V).

        Raises:
            ConfigError: As `step`.
        """
        result = self._advance(
            logits if logits.dtype == torch.float64 else logits.float(),
            timestep,
            sample,
            is_masked=is_free & (sample == logits.shape[-1]),
            state=state,
            is_free=is_free,
            generator=generator,
            token_quality=token_quality,
            allowed=allowed,
        )
        return _taken(result, sample, state)

    def _advance(
        self,
        logits: Float[Tensor, "masked columns"],
        timestep: float | Tensor,
        sample: Int[Tensor, "batch seq"],
        *,
        is_masked: Bool[Tensor, "batch seq"],
        state: SchedulerState,
        is_free: Bool[Tensor, "batch seq"],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        token_quality: Tensor | None,
        allowed: Tensor | None,
    ) -> StepResult | None:
        """Check, plan and `_reverse`; None where the step commits nothing."""
        times = self._times(timestep, state.settings)
        check_shape("is_free", is_free, tuple(sample.shape))
        check_shape("state.initial_sample", state.initial_sample, tuple(sample.shape))
        if token_quality is not None:
            check_shape("token_quality", token_quality, tuple(sample.shape))
        mask_column = logits.shape[-1]
        was_masked = is_free & (state.initial_sample == mask_column)
        counted = torch.stack([is_free, was_masked, is_masked])
        num_free, num_initial, num_masked = counted.sum(dim=2).tolist()
        check_logits(logits, sum(num_masked))
        check_length_rule(state.modality, state.settings, mask_column)
        if not (times.has_begun and len(logits)):
            return None
        planned = _planned_counts(state, num_initial, mask_column, times)
        num_left = [
            max(min(left, now - 1), 0) for left, now in zip(planned, num_masked, strict=True)
        ]
        return self._reverse(
            StepInput(
                logits=logits,
                sample=sample,
                is_masked=is_masked,
                is_free=is_free,
                allowed=allowed_at(allowed, is_masked, mask_column),
                uniforms=self._draw_uniforms(
                    generator, is_free, num_free, is_masked, state.settings
                ),
                num_left=torch.tensor(num_left, device=sample.device),
                times=times,
                settings=state.settings,
                memory=state.memory,
                ends_window=state.ends_window,
            )
        )

    @abstractmethod
    def _reverse(self, step: StepInput) -> StepResult:
        """Draw tokens and commit some; at least one in every row that has a masked position."""

    def _needs_generator(self, settings: ModalitySettings) -> bool:
        """Whether these settings draw anything."""
        return settings.temperature > 0.0 or settings.choice_temperature > 0.0

    def _times(self, timestep: float | Tensor, settings: ModalitySettings) -> StepTimes:
        """Find the step of this timestep and its place in the group's window, in float64."""
        if self.num_inference_steps is None:
            raise ConfigError(
                "`set_timesteps` must be called before `step`; got no timesteps. Call"
                " `scheduler.set_timesteps(num_inference_steps)`."
            )
        return StepTimes.find(float(timestep), self.num_inference_steps, settings)

    def _draw_uniforms(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        is_free: Bool[Tensor, "batch seq"],
        num_free: Sequence[int],
        is_masked: Bool[Tensor, "batch seq"],
        settings: ModalitySettings,
    ) -> Float[Tensor, "batch seq 2"]:
        """Two uniform numbers per free position of each unfinished row, from the row's generator.

        A row draws as many numbers at each step, whatever is committed in it and however wide the
        batch is; a finished row draws none. So a row of a batch and a single call draw the same.
        """
        uniforms = torch.full((*is_free.shape, 2), 0.5, dtype=torch.float64, device=is_free.device)
        if not self._needs_generator(settings):
            return uniforms
        generators = as_row_generators(generator, is_free.shape[0])
        is_unfinished = is_masked.any(dim=1, keepdim=True)
        draws = [
            torch.rand((count, 2), generator=own, dtype=torch.float64, device=own.device)
            for own, count, unfinished in zip(
                generators, num_free, is_unfinished.flatten().tolist(), strict=True
            )
            if unfinished
        ]
        drawn = torch.cat([draw.to(is_free.device) for draw in draws])
        return uniforms.masked_scatter_((is_free & is_unfinished)[..., None], drawn)


def _taken(
    result: StepResult | None, sample: Int[Tensor, "batch seq"], state: SchedulerState
) -> MaskedStepOutput:
    """The outcome of a step, in new tensors also where nothing was to be done."""
    if result is None:
        return MaskedStepOutput(sample.clone(), sample.clone(), state)
    return MaskedStepOutput(
        result.prev_sample, result.proposal.columns, replace(state, memory=result.memory)
    )


def _planned_counts(
    state: SchedulerState, num_initial: Sequence[int], mask_column: int, times: StepTimes
) -> list[int]:
    """Positions left masked after the step, in each row.

    floor(N0 (1 - alpha)), in float64 with +1e-9; or what the step plan of a profile leaves, where
    the group's known tokens count as known. (A block is planned as a window of its own.)
    """
    profile = state.settings.step_profile
    if profile is None:
        return [math.floor(count * times.masked_share + 1e-9) for count in num_initial]
    known = (state.initial_sample < mask_column).sum(dim=1)
    return [
        count
        - sum(plan_steps(profile, count, times.num_steps, num_known=num_known)[: times.num_done])
        if count
        else 0
        for count, num_known in zip(num_initial, known.tolist(), strict=True)
    ]
