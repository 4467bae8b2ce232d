"""Where one step of a run stands in the time window of its group."""

import math
from dataclasses import dataclass
from functools import lru_cache

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers.settings import TIME_TOLERANCE, ModalitySettings


@dataclass(frozen=True)
class StepTimes:
    """Where one step stands in the time window of its group.

    Args:
        has_begun: The step ends inside the window, so it commits at least one token per row.
        is_last: The step ends at the close of the window, so it commits everything.
        masked_share: Share of the group that the plan leaves masked after the step.
        share_before: The same before the step.
        time_left: Local time after the step, from 1 (start) to 0 (stop).
        num_done: Steps of the window that are over after this one.
        num_steps: Steps of the window.
    """

    has_begun: bool
    is_last: bool
    masked_share: float
    share_before: float
    time_left: float
    num_done: int
    num_steps: int

    @classmethod
    def find(cls, t: float, count: int, settings: ModalitySettings) -> "StepTimes":
        """The step of `count` that begins at time t, in the time window of `settings`.

        Raises:
            ConfigError: When no step begins there.
        """
        index = round((1.0 - t) * count) if math.isfinite(t) else -1
        if not 0 <= index < count or abs((1.0 - index / count) - t) > 0.01 / count:
            raise ConfigError(
                f"`timestep` must be one of `timesteps`, 1 - i / {count} for i = 0..{count - 1};"
                f" got {t}. Loop over `scheduler.timesteps`."
            )
        before, after = 1.0 - index / count, 1.0 - (index + 1) / count
        time_left = settings.local_time(after)
        first, last = _steps_inside(count, settings.start, settings.stop)
        return cls(
            has_begun=after < settings.start - TIME_TOLERANCE,
            is_last=time_left <= TIME_TOLERANCE,
            masked_share=settings.masked_share(after),
            share_before=settings.masked_share(before),
            time_left=time_left,
            num_done=min(index, last) - first + 1,
            num_steps=last - first + 1,
        )


@lru_cache(maxsize=256)
def _steps_inside(count: int, start: float, stop: float) -> tuple[int, int]:
    """The first and the last step of a time window that commit something."""
    after = [1.0 - (index + 1) / count for index in range(count)]
    first = next(index for index, t in enumerate(after) if t < start - TIME_TOLERANCE)
    last = next(index for index, t in enumerate(after) if t <= stop + TIME_TOLERANCE)
    return first, max(first, last)
