"""What a callback gets: the state of a run after a step, with a way to log."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from multimodal_dlm.training.ema import ExponentialMovingAverage


@dataclass(frozen=True)
class TrainState:
    """What a callback gets.

    Args:
        step: Optimizer steps taken.
        num_train_steps: Length of the run.
        model: The trained component.
        ema: Averaged weights, or None.
        output_dir: Folder of the run.
        components: Tokenizers, processor and scheduler, by name.
        log: Writes scalars to the trackers and the metrics file.
    """

    step: int
    num_train_steps: int
    model: nn.Module
    ema: ExponentialMovingAverage | None
    output_dir: Path
    components: Mapping[str, Any]
    log: Callable[[Mapping[str, float]], None]

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The model holding its averaged weights, if there are any, for the time of a `with`."""
        return self.ema.applied(self.model) if self.ema else nullcontext(self.model)


Callback = Callable[[TrainState], None]
