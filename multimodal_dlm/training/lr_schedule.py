"""Learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from multimodal_dlm.errors import ConfigError


def learning_rate(
    step: int, *, peak: float, num_train_steps: int, num_warmup_steps: int, final_share: float
) -> float:
    """Linear warm-up to `peak`, then a half cosine to `peak * final_share` at the last step.

    Args:
        step: From 0 to num_train_steps - 1.
        peak: Highest rate, reached at step `num_warmup_steps`.
        num_train_steps: Length of the run.
        num_warmup_steps: Length of the warm-up; shortened to half of a short run.
        final_share: Last rate over the peak, in [0, 1].
    """
    if not 0.0 <= final_share <= 1.0:
        raise ConfigError(f"`final_share` must lie in [0, 1]; got {final_share}. Use 0.02.")
    warmup = min(num_warmup_steps, num_train_steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_train_steps - 1 - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))
