"""Where one step of a run goes: milliseconds and PyTorch operators of each part.

The parts are timed from outside, around functions of the library, each without what it calls of
another part. What is left of a step is the loop: canvases, ids, windows, and Python between the
parts. Operators are counted in a run of their own, as the dispatcher sees them: views count too.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal_dlm.models import attention, transformer
from multimodal_dlm.models.native import bf16, float32
from multimodal_dlm.schedulers import DiscreteScheduler

LOOP = "loop"
PARTS = {
    "linear": (torch.nn.Linear, "forward"),
    "native projections": (float32, "float_project"),
    "native output": (float32, "float_add_projected"),
    "native MLP": (float32, "float_mlp"),
    "native attention in bf16": (bf16, "attention_inference"),
    "native MLP in bf16": (bf16, "mlp_inference"),
    "attention": (attention.F, "scaled_dot_product_attention"),
    "attention in bf16": (attention, "eager_attention"),
    "rest of the forward": (transformer.UnifiedTransformerModel, "forward"),
    "head": (transformer.Head, "forward"),
    "sampling": (DiscreteScheduler, "step_masked"),
}


class OperatorCount(TorchDispatchMode):
    """Counts the operators of a block of code.

    Args:
        part: Says whose the next operator is.
    """

    def __init__(self, part: Callable[[], str] = lambda: LOOP) -> None:
        super().__init__()
        self.counts: dict[str, float] = defaultdict(float)
        self._part = part

    @property
    def total(self) -> int:
        """Operators of all parts."""
        return int(sum(self.counts.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Count one operator and run it."""
        self.counts[self._part()] += 1
        return func(*args, **(kwargs or {}))


class _Clock:
    """Seconds of each part, those of an inner part taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = [LOOP]
        self._last = time.perf_counter()

    @property
    def part(self) -> str:
        """The part that runs now."""
        return self._stack[-1]

    def settle(self) -> None:
        """Give the time since the last change to the part that runs now."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self._last
        self._last = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as a part's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            self._stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.settle()
                self._stack.pop()

        return timed


@contextmanager
def _clocked() -> Iterator[_Clock]:
    clock = _Clock()
    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            function = clock.around(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))
        yield clock


def step_parts(run: Callable[[Callable[..., dict]], Any], repeats: int) -> dict[str, Any]:
    """Milliseconds (median) and operators (mean) of each part of a step after the first.

    Args:
        run: Calls a pipeline with the given `callback_on_step_end`, at least two steps long.
        repeats: Timed runs, after one that is not counted.
    """
    with _clocked() as clock:
        taken: list[dict[str, float]] = []
        for number in range(repeats + 1):
            taken.extend(_by_step(run, clock.seconds, clock.settle) if number else [])
            if not number:
                _by_step(run, clock.seconds, clock.settle)
        with OperatorCount(lambda: clock.part) as count:
            operators = _by_step(run, count.counts, lambda: None)
    names = [name for name in (*PARTS, LOOP) if any(step.get(name) for step in taken)]
    milliseconds = {
        name: 1000 * statistics.median(step.get(name, 0.0) for step in taken) for name in names
    }
    whole = sum(milliseconds.values())
    return {
        name: {
            "milliseconds": round(milliseconds[name], 3),
            "share": round(milliseconds[name] / whole, 3),
            "operators": round(statistics.mean(step.get(name, 0.0) for step in operators), 1),
        }
        for name in names
    }


def _by_step(
    run: Callable[[Callable[..., dict]], Any],
    totals: dict[str, float],
    settle: Callable[[], None],
) -> list[dict[str, float]]:
    """What running totals grew by from the end of each step to the end of the next."""
    marks: list[dict[str, float]] = []

    def mark(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, timestep
        settle()
        marks.append(dict(totals))
        return tensors

    run(mark)
    pairs = zip(marks, marks[1:], strict=False)
    return [{name: new[name] - old.get(name, 0.0) for name in new} for old, new in pairs]
