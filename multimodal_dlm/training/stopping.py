"""Ending a run in order: SIGTERM and SIGINT ask for a checkpoint after the step that runs."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from accelerate import Accelerator
from accelerate.utils import gather_object

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether a signal reached this process, or any other."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals for the time of a `with`; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            del frame
            logger.warning("Signal %d: stopping after this step.", number)
            self.is_asked = True

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def is_shared(self, accelerator: Accelerator) -> bool:
        """True on every process once a signal reached any of them."""
        if accelerator.num_processes == 1:
            return self.is_asked
        return any(gather_object([self.is_asked]))
