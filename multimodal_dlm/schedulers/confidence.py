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
        proposal = propose(step, step.sample, step.is_masked, step.allowed)
        scores = self._scores(step, proposal.confidence, step.is_masked)
        chosen = self._chosen(step, proposal, scores, step.is_masked)
        return StepResult(
            prev_sample=torch.where(chosen.is_sure, proposal.columns, step.sample),
            pred_original_sample=proposal.columns,
            pred_logits=proposal.pred_logits,
            memory=chosen.memory,
        )

    def _reverse_window(self, step: StepInput, eos: int, fill: int) -> StepResult:
        everywhere = torch.ones_like(step.is_masked)
        window = TextWindow(
            sample=step.sample,
            is_masked=step.is_masked,
            eos=eos,
            fill=fill,
            mask_column=step.mask_column,
            ends_window=step.ends_window,
            may_be_eos=everywhere if step.allowed is None else step.allowed[..., eos],
            may_be_fill=everywhere if step.allowed is None else step.allowed[..., fill],
        ).filled()
        possible = window.possible_columns(step.mask_column)
        if step.allowed is not None:
            possible = _narrow(step.allowed, possible)
        closing = torch.ones_like(possible)
        closing[window.is_end] = False
        closing[..., eos] = True
        closing[..., fill] = True
        proposal = propose(
            step, window.sample, window.is_masked, possible, _narrow(possible, closing)
        )
        scores = self._scores(step, proposal.confidence, window.is_masked)
        chosen = self._chosen(step, proposal, scores, window.is_masked)
        window = window.commit(proposal.columns, scores, chosen.is_sure, is_last=step.times.is_last)
        return StepResult(
            prev_sample=window.sample,
            pred_original_sample=proposal.columns,
            pred_logits=proposal.pred_logits,
            memory=chosen.memory,
        )

    def _chosen(
        self,
        step: StepInput,
        proposal: Proposal,
        scores: Float[Tensor, "batch seq"],
        is_masked: Bool[Tensor, "batch seq"],
    ) -> Selection:
        """What the plan takes by score, and what the commit rule calls sure."""
        count = is_masked.sum(dim=1) - step.num_left
        rule = step.settings.rule
        if rule is None:
            return Selection(_best(scores, is_masked, count))
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
        return Selection(selection.is_sure | _best(scores, is_masked, count), selection.memory)

    def _scores(
        self,
        step: StepInput,
        confidence: Float[Tensor, "batch seq"],
        is_masked: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq"]:
        """Confidence plus annealed Gumbel noise, float64; -inf where not masked."""
        noise = step.settings.choice_temperature * step.times.time_left
        scores = confidence.to(torch.float64) + noise * gumbel_noise(step.uniforms[..., 1])
        return scores.masked_fill(~is_masked, -torch.inf)


def _best(
    scores: Float[Tensor, "batch seq"],
    is_masked: Bool[Tensor, "batch seq"],
    count: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch seq"]:
    """The `count` best-scored masked positions of each row."""
    return is_masked & (rank_descending(scores) < count[:, None])


def _narrow(
    wide: Bool[Tensor, "batch seq columns"], narrow: Bool[Tensor, "batch seq columns"]
) -> Bool[Tensor, "batch seq columns"]:
    """Both restrictions where a column satisfies them, else the wider one alone."""
    both = wide & narrow
    return torch.where(both.any(dim=-1, keepdim=True), both, wide)
