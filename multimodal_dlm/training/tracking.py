"""What a run reports: a line for people, a row of JSON, and accelerate's trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.training.objectives.base import Term

logger = logging.getLogger(__name__)


class TermMeter:
    """Adds terms over micro-batches and steps, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, terms: Mapping[str, Term | Tensor]) -> None:
        """Add terms; a plain tensor counts once."""
        for name, term in terms.items():
            if not isinstance(term, Term):
                term = Term(torch.as_tensor(term).detach().float(), torch.ones(()))
            total, count = term.total.detach().double(), term.count.double()
            if name in self._sums:
                total, count = self._sums[name][0] + total, self._sums[name][1] + count
            self._sums[name] = [total, count]

    def terms(self) -> dict[str, Term]:
        """Both sums of each term, where they are."""
        return {name: Term(total, count) for name, (total, count) in self._sums.items()}

    def sums(self) -> dict[str, tuple[float, float]]:
        """Both sums of each term, for joining processes."""
        return {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}

    def add_sums(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Add what `sums` gave, as a checkpoint kept it."""
        exact = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}
        self.add({name: Term(pair[0], pair[1]) for name, pair in exact.items()})

    def clear(self) -> None:
        """Start again."""
        self._sums = {}


def join_sums(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means of terms over processes, by name, sorted."""
    joined: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            old = joined.get(name, (0.0, 0.0))
            joined[name] = (old[0] + total, old[1] + count)
    return {name: joined[name][0] / joined[name][1] for name in sorted(joined) if joined[name][1]}


class MetricsFile:
    """`metrics.jsonl`: one JSON row per logged step; rows after a resumed step are dropped."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        kept: list[str] = []
        if path.is_file():
            kept = [row for row in path.read_text().splitlines() if _step_of(row) <= first_step]
        aside = path.with_suffix(".part")
        aside.write_text("".join(f"{row}\n" for row in kept))
        os.replace(aside, path)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Put the rows on disk, before a checkpoint that they lead up to."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


class Clock:
    """Tokens a second and time left, over the steps of this process alone."""

    def __init__(self, first_step: int, num_train_steps: int) -> None:
        self.first_step, self.num_train_steps = first_step, num_train_steps
        self.start_s = self.mark_s = time.monotonic()
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self.tokens += tokens

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last reading, and the time left at the average pace."""
        now = time.monotonic()
        elapsed = now - self.start_s
        values = {
            "tokens_per_s": self.tokens / max(now - self.mark_s, 1e-9),
            "elapsed_s": elapsed,
            "eta_s": elapsed / max(1, step - self.first_step) * (self.num_train_steps - step),
        }
        self.mark_s, self.tokens = now, 0
        return values


def human_line(step: int, num_train_steps: int, values: Mapping[str, float]) -> str:
    """One line for people: step, loss, bounds, rate and time left."""
    shown = [f"step {step}/{num_train_steps}"]
    shown.append(f"loss {values['loss']:.4f}" if "loss" in values else "skipped")
    for name, value in values.items():
        parts = name.split("/")
        if parts[0] in ("nelbo", "content") and len(parts) == 2:
            shown.append(f"{parts[1]}{'*' if parts[0] == 'content' else ''} {value:.3f}")
    shown += [
        f"grad {values.get('grad_norm', math.nan):.2f}",
        f"lr {values['lr']:.2e}",
        f"{values['tokens_per_s']:,.0f} tok/s",
        f"left {duration(values['eta_s'])}",
    ]
    return " | ".join(shown)


def duration(seconds: float) -> str:
    """Seconds as `1 h 05 min` or `4 min 10 s`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _step_of(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
