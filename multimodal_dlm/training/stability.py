"""Steps that must not count, and steps that stand out.

A step whose loss or gradient is no finite number is skipped: weights, optimizer and averages stay
as they were, while the step keeps its place in the learning-rate schedule and in the data. A loss
or a gradient norm far above the median of the last steps is a spike: reported, not skipped. All of
it is a function of the numbers of the steps, which every process knows, and of a small JSON state.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from multimodal_dlm.errors import DivergenceError
from multimodal_dlm.training.config import StabilityConfig

logger = logging.getLogger(__name__)

MIN_VALUES = 16  # Fewer say nothing of the spread.
MAD_TO_DEVIATION = 1.4826  # Of a normal law: standard deviation / median absolute deviation.
SHOWN_SAMPLES = 8


class RunningSpread:
    """Median and median absolute deviation of the last values; one outlier does not move them.

    Args:
        window: Values kept.
    """

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window)

    def deviations(self, value: float) -> float:
        """How many (robust) standard deviations a value lies above the median of those before.

        0 while fewer than 16 values are known. The spread is taken to be at least a thousandth of
        the median, so that a constant has no spikes of rounding.
        """
        if len(self.values) < MIN_VALUES:
            return 0.0
        median = statistics.median(self.values)
        spread = statistics.median(abs(other - median) for other in self.values)
        floor = max(1e-3 * abs(median), 1e-12)
        return (value - median) / max(MAD_TO_DEVIATION * spread, floor)

    def add(self, value: float) -> None:
        """Take a value in."""
        self.values.append(value)


class StabilityMonitor:
    """Decides which steps are skipped, names spikes, and ends a run that diverges.

    Args:
        config: Limits.
    """

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.spreads = {name: RunningSpread(config.window) for name in ("loss", "grad_norm")}
        self.num_spikes = dict.fromkeys(self.spreads, 0)
        self.num_skipped = 0
        self.skipped: list[int] = []
        self.in_a_row = 0

    def accepts(self, step: int, values: Mapping[str, float], samples: Sequence[str]) -> bool:
        """Whether a step counts; the same answer on every process.

        Args:
            step: Number of the step, from 0.
            values: `loss` and `grad_norm` of the global batch.
            samples: Source and key of the rows behind them, or of those that are no number.

        Raises:
            DivergenceError: When too many steps, in a row or of the last `window`, were skipped.
        """
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._skip(step, broken[0], values[broken[0]], samples)
            return False
        self.in_a_row = 0
        for name, value in values.items():
            self._watch(step, name, value, samples)
        return True

    def _skip(self, step: int, name: str, value: float, samples: Sequence[str]) -> None:
        config = self.config
        self.num_skipped += 1
        self.in_a_row += 1
        self.skipped = [past for past in self.skipped if past > step - config.window] + [step]
        message = (
            f"The {'loss' if name == 'loss' else 'gradient'} must be finite; got {value} in step"
            f" {step} with the samples {_listed(samples)}"
        )
        is_over = len(self.skipped) > config.max_skipped_share * config.window
        if self.in_a_row > config.max_skipped_in_a_row or is_over:
            raise DivergenceError(
                f"{message}. That makes {self.in_a_row} such steps in a row and"
                f" {len(self.skipped)} of the last {config.window} (`stability` allows"
                f" {config.max_skipped_in_a_row} and {config.max_skipped_share:.0%}). Lower"
                " `optimizer.lr` or look at these samples; the last checkpoint is whole."
            )
        logger.warning("%s. Skipped.", message)

    def _watch(self, step: int, name: str, value: float, samples: Sequence[str]) -> None:
        """Compare with the steps before, then take the value in."""
        spread, limit = self.spreads[name], self.config.spike_deviations
        deviations = spread.deviations(value)
        spread.add(value)
        if limit and deviations > limit:
            self.num_spikes[name] += 1
            logger.warning(
                "Spike: the %s of step %d is %.4g, %.0f deviations above the median of the last"
                " steps, with the samples %s.",
                *(name, step, value, deviations, _listed(samples)),
            )

    def counts(self) -> dict[str, float]:
        """Skipped steps and spikes since the run began, for the log."""
        spikes = {f"spikes/{name}": float(count) for name, count in self.num_spikes.items()}
        return {"skipped_steps": float(self.num_skipped), **spikes}

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "num_skipped": self.num_skipped,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "num_spikes": self.num_spikes,
            "values": {name: list(spread.values) for name, spread in self.spreads.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.num_skipped, self.in_a_row = state["num_skipped"], state["in_a_row"]
        self.skipped = list(state["skipped"])
        self.num_spikes = dict(state["num_spikes"])
        for name, values in state["values"].items():
            self.spreads[name].values.extend(values)


def check_weights(model: nn.Module) -> None:
    """Refuse a model that ends with weights that are no numbers.

    Raises:
        DivergenceError: When some are not finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DivergenceError(
                f"The weights must be finite at the end of a run; `{name}` holds nan or inf. Lower"
                " `optimizer.lr` and go on from the last checkpoint, which is whole."
            )


def _listed(samples: Sequence[str]) -> str:
    more = " ..." if len(samples) > SHOWN_SAMPLES else ""
    return ", ".join(samples[:SHOWN_SAMPLES]) + more
