"""Ancestral sampling of the absorbing process: uniformly random positions, any number at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 (loaded by name)

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.schedulers.base import DiscreteScheduler, StepInput, StepResult
from multimodal_dlm.schedulers.presets import ANCESTRAL_MODALITIES
from multimodal_dlm.schedulers.settings import ModalitySettings
from multimodal_dlm.schedulers.shaping import rank_descending

COUNTS = ("planned", "binomial")


class AbsorbingAncestralScheduler(DiscreteScheduler):
    """Reveal masked positions in uniformly random order, each drawn from its own distribution.

    The reverse of the absorbing process reveals each masked position between t and s < t
    independently with probability (alpha_s - alpha_t) / (1 - alpha_t), whatever the tokens are
    (Sahoo et al. 2024, arXiv 2406.07524, Eq. 6). So the *order* is a uniformly random permutation
    that is independent of the tokens, and the steps only cut it into groups drawn in parallel.
    Random cuts may leave a step empty: a forward without effect, since the backbone knows masks and
    not times. Both rules below draw the order exactly and never leave a step empty:

    - `planned`: the cuts are the expected counts, floor(N0 (1 - alpha)), clipped so that each step
      reveals at least one. With as many steps as tokens and the linear mask schedule each step
      reveals exactly one token, which is the first-hitting sampler (Zheng et al. 2024,
      arXiv 2409.02908): with a perfect denoiser the sample is exact in distribution.
    - `binomial`: each masked position is revealed independently with the probability above; where
      that reveals none, the first one to be hit is revealed.

    With one step both draw from the product of the marginals. `temperature`, `top_k` and `top_p`
    other than 1, None and None leave the model's distribution. `choice_temperature`,
    `commit_rule`, `eos_column` and `fill_column` are for confidence-type schedulers: here `<eos>`
    and `<fill>` are ordinary tokens and the order is random already.

    Args:
        modalities: Options per modality, see `ModalitySettings`; None for the preset.
        counts: Rule for the number of tokens revealed in a step, `planned` or `binomial`.

    Raises:
        ConfigError: When an option is unknown or out of range.
    """

    @register_to_config
    def __init__(
        self, *, modalities: Mapping[str, Any] | None = None, counts: str = "planned"
    ) -> None:
        if counts not in COUNTS:
            raise unknown_name("`counts` rule", counts, COUNTS)
        self._configure(modalities, ANCESTRAL_MODALITIES)
        self._is_binomial = counts == "binomial"
        planned = [name for name, own in self._settings.items() if own.step_profile is not None]
        if self._is_binomial and planned:
            raise ConfigError(
                f"`step_profile` plans counts, and `counts` is `binomial`, which draws them; got"
                f' both for {planned}. Use `counts="planned"`.'
            )

    def _needs_generator(self, settings: ModalitySettings) -> bool:
        return True

    def _reverse(self, step: StepInput) -> StepResult:
        proposal = step.propose()
        hitting = step.uniforms[..., 1].masked_fill(~step.is_masked, torch.inf)
        num_masked = step.is_masked.sum(dim=1)
        count = num_masked - step.num_left
        if self._is_binomial:
            before, after = step.times.share_before, step.times.masked_share
            probability = 1.0 - after / before if before > 0.0 else 1.0
            count = (hitting < probability).sum(dim=1).clamp(min=1)
        is_revealed = step.is_masked & (rank_descending(-hitting) < count[:, None])
        return StepResult(
            prev_sample=torch.where(is_revealed, proposal.columns, step.sample),
            proposal=proposal,
        )
