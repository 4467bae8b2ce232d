"""Confidence-ordered parallel decoding with a length rule for windows of text."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 (loaded by name)
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.schedulers.base import DiscreteScheduler, StepInput, StepResult
from multimodal_dlm.schedulers.commit_rules import Candidates, Selection
from multimodal_dlm.schedulers.presets import CONFIDENCE_MODALITIES
from multimodal_dlm.schedulers.proposal import Proposal, propose
from multimodal_dlm.schedulers.shaping import gumbel_noise, rank_descending
from multimodal_dlm.schedulers.text_window import TextWindow


class ConfidenceScheduler(DiscreteScheduler):
    """Commit the tokens the model is most sure of, as many per step as the mask schedule says.

    Each masked position draws a token; its score is the log-probability of that token under the
    column-restricted softmax at temperature 1, plus choice_temperature x time left x Gumbel noise
    (Chang et al. 2022, MaskGIT, arXiv 2202.04200). The k best scores are committed, k = masked now
    - floor(N0 (1 - alpha)), at least 1. A modality's `commit_rule` commits what it calls sure
    ahead of that plan, so that a run may end early; the plan stays the least a step commits.

    Where a modality has `eos_column` and `fill_column`, a finished window is content, one `<eos>`,
    then `<fill>`: a chosen `<fill>` with no `<eos>` to its left is held back, but counts in the
    plan, and so does content right of the first `<eos>`; committing `<eos>` fills the masks to its
    right for free. `<eos>` and `<fill>` are not drawn left of known text, nor content at the last
    place an `<eos>` could still take. If nothing is left to commit, the best-scored token that is
    not `<fill>` is committed, or else the leftmost masked position becomes `<eos>`; at the last
    step the leftmost held-back `<fill>` does. `allowed` outranks all of these.

    Args:
        modalities: Options per modality, see `ModalitySettings`; None for the preset.

    Raises:
        ConfigError: When an option is unknown or out of range.
    """

    @register_to_config
    def __init__(self, *, modalities: Mapping[str, Any] | None = None) -> None:
        self._configure(modalities, CONFIDENCE_MODALITIES)

    def _reverse(self, step: StepInput) -> StepResult:
        if step.settings.eos_column is None or step.settings.fill_column is None:
            return self._reverse_plain(step)
        return self._reverse_window(step, step.settings.eos_column, step.settings.fill_column)

    def _reverse_plain(self, step: StepInput) -> StepResult:
        proposal = step.propose()
        scores = self._scores(step, proposal)
        chosen = self._chosen(step, proposal, scores)
        return StepResult(
            prev_sample=torch.where(chosen.is_sure, proposal.columns, step.sample),
            proposal=proposal,
            memory=chosen.memory,
        )

    def _reverse_window(self, step: StepInput, eos: int, fill: int) -> StepResult:
        window = TextWindow(
            sample=step.sample,
            is_masked=step.is_masked,
            eos=eos,
            fill=fill,
            mask_column=step.mask_column,
            may_be_eos=_may_be(eos, step),
            may_be_fill=_may_be(fill, step),
            ends_window=step.ends_window,
        )
        possible, drawable = window.restrict(step.possible, step.allowed)
        proposal = propose(
            window.filled,
            window.is_waiting,
            possible,
            drawable,
            settings=step.settings,
            uniforms=step.uniforms,
        )
        scores = self._scores(step, proposal)
        chosen = self._chosen(step, proposal, scores)
        return StepResult(
            prev_sample=window.commit(
                proposal.columns, scores, chosen.is_sure, is_last=step.times.is_last
            ),
            proposal=proposal,
            memory=chosen.memory,
        )

    def _chosen(
        self, step: StepInput, proposal: Proposal, scores: Float[Tensor, "batch seq"]
    ) -> Selection:
        """What the plan takes by score, and what the commit rule calls sure."""
        is_masked = proposal.is_masked
        best = _best(scores, is_masked, is_masked.sum(dim=1) - step.num_left)
        rule = step.settings.rule
        if rule is None:
            return Selection(best)
        selection = rule(
            Candidates(
                is_masked=is_masked,
                confidence=proposal.confidence,
                log_probabilities=proposal.log_probabilities,
                num_done=step.times.num_done,
                num_steps=step.times.num_steps,
                memory=step.memory,
            )
        )
        return Selection(selection.is_sure | best, selection.memory)

    def _scores(self, step: StepInput, proposal: Proposal) -> Float[Tensor, "batch seq"]:
        """Confidence plus annealed Gumbel noise, float64; -inf where not masked."""
        scores = proposal.confidence.to(torch.float64)
        noise = step.settings.choice_temperature * step.times.time_left
        if noise > 0.0:
            scores = scores + noise * gumbel_noise(step.uniforms[..., 1])
        return scores.masked_fill(~proposal.is_masked, -torch.inf)


def _best(
    scores: Float[Tensor, "batch seq"],
    is_masked: Bool[Tensor, "batch seq"],
    count: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch seq"]:
    """The `count` best-scored masked positions of each row."""
    return is_masked & (rank_descending(scores) < count[:, None])


def _may_be(column: int, step: StepInput) -> Bool[Tensor, "batch seq"]:
    """Masked positions that may take a column."""
    if step.allowed is None:
        return step.is_masked
    return step.is_masked.masked_scatter(step.is_masked, step.allowed[:, column])
