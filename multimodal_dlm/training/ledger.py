"""The ledger of the data: every epoch, what the loop got is compared with what it had to get.

For each source, rows yielded + rows skipped (by reason) must be the slots of the epoch, and samples
drawn + samples filtered those of the manifest. So for a source that is passed over once in an
epoch, yielded + skipped + filtered = manifest. A digest over the numbers of all rows tells a row
that came twice from one that was lost.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from multimodal_dlm.datasets.mixture import EpochPlan
from multimodal_dlm.datasets.selection import FILLED, YIELDED
from multimodal_dlm.errors import DataError
from multimodal_dlm.training.objectives.base import Batch

logger = logging.getLogger(__name__)

Gather = Callable[[list[Any]], list[Any]]
_WORD = 1 << 64
_CHUNK = 1 << 20


def rows_digest(rows: np.ndarray) -> int:
    """Sum of a 64-bit hash (splitmix64, Steele et al. 2014) of row numbers, modulo 2^64."""
    with np.errstate(over="ignore"):
        z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


class Ledger:
    """Counts the rows of the current epoch; part of every checkpoint.

    Args:
        plan: What an epoch must hold.
        gather: Joins the lists of all processes, such as `accelerate.utils.gather_object`.
    """

    def __init__(self, plan: EpochPlan, gather: Gather = list) -> None:
        self.plan, self.gather = plan, gather
        self.first_step: int | None = None
        self._counts: Counter[tuple[str, str]] = Counter()  # Of all processes.
        self._digest = 0
        self._own: Counter[tuple[str, str]] = Counter()  # Of this process, not yet shared.
        self._own_digest = 0

    def add(self, step: int, batches: Sequence[Batch]) -> dict[str, Any] | None:
        """Count this process's rows of a step; close the epoch when it was the last one.

        Returns:
            The report of the epoch when this step ended one, else None.

        Raises:
            DataError: When the epoch did not hold what it had to.
        """
        if self.first_step is None:
            self.first_step = step
        for batch in batches:
            for key, outcome in zip(batch.keys, batch.outcomes, strict=True):
                self._own[key.rsplit("/", 1)[0], outcome] += 1
            self._own_digest += rows_digest(np.asarray(batch.numbers))
        return self._close(step) if (step + 1) % self.plan.num_batches == 0 else None

    def share(self) -> None:
        """Add up what all processes counted; every process takes part."""
        for counts, digest in self.gather([(dict(self._own), self._own_digest)]):
            self._counts.update(counts)
            self._digest = (self._digest + digest) % _WORD
        self._own.clear()
        self._own_digest = 0

    def state(self) -> dict[str, Any]:
        """What was counted before the last `share`, as JSON values."""
        counts = [[source, outcome, n] for (source, outcome), n in sorted(self._counts.items())]
        return {"first_step": self.first_step, "counts": counts, "digest": str(self._digest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.first_step = state["first_step"]
        self._counts = Counter({(source, outcome): n for source, outcome, n in state["counts"]})
        self._digest = int(state["digest"])

    def _close(self, step: int) -> dict[str, Any]:
        self.share()
        report = {
            "epoch": step // self.plan.num_batches,
            "sources": {name: self._source(name) for name in self.plan.selections},
            "filled": sum(n for (_, outcome), n in self._counts.items() if outcome == FILLED),
        }
        is_whole = (
            self.first_step is not None and self.first_step <= step + 1 - self.plan.num_batches
        )
        if is_whole:
            self._check(report)
        else:
            logger.warning("The ledger saw epoch %d from step %s on only.", report["epoch"],
                           self.first_step)  # fmt: skip
        self._counts.clear()
        self._digest, self.first_step = 0, step + 1
        return report

    def _source(self, name: str) -> dict[str, Any]:
        selection = self.plan.selections[name]
        found = {o: n for (source, o), n in sorted(self._counts.items()) if source == name}
        return {
            "manifest": selection.num_samples,
            "filtered": dict(selection.filtered),
            "slots": self.plan.slots[name],
            "yielded": found.pop(YIELDED, 0),
            "skipped": {outcome: n for outcome, n in found.items() if outcome != FILLED},
        }

    def _check(self, report: Mapping[str, Any]) -> None:
        for name, source in report["sources"].items():
            drawn = source["yielded"] + sum(source["skipped"].values())
            size = self.plan.selections[name].size
            kept = source["manifest"] - sum(source["filtered"].values())
            if drawn != source["slots"] or size != kept:
                raise DataError(
                    f"Epoch {report['epoch']} must hold {source['slots']} rows of `{name}`, drawn"
                    f" from {kept} samples; it held {drawn}, drawn from {size}. Rows were lost or"
                    " came twice: stop, and report it with the run's log.",
                    reason="ledger",
                )
        first = report["epoch"] * self.plan.num_rows
        last = first + self.plan.num_rows
        expected = sum(
            rows_digest(np.arange(start, min(start + _CHUNK, last)))
            for start in range(first, last, _CHUNK)
        )
        if self._digest != expected % _WORD:
            raise DataError(
                f"Epoch {report['epoch']} must hold each of its {self.plan.num_rows} rows once; the"
                " digest of the rows differs. Rows were lost or came twice: stop, and report it"
                " with the run's log.",
                reason="ledger",
            )


def ledger_lines(report: Mapping[str, Any]) -> list[str]:
    """A report as lines to read."""
    lines = []
    for name, source in report["sources"].items():
        filtered = sum(source["filtered"].values())
        size = source["manifest"] - filtered
        line = (
            f"Ledger, epoch {report['epoch']}, {name}: {source['yielded']:,} yielded +"
            f" {sum(source['skipped'].values()):,} skipped{_reasons(source['skipped'])}"
        )
        if source["slots"] != size:
            passes = source["slots"] / size
            line += f" = {source['slots']:,} rows, {passes:.2f} passes over {size:,} samples;"
        line += f" + {filtered:,} filtered{_reasons(source['filtered'])}"
        lines.append(f"{line} = {source['manifest']:,} in the manifest.")
    return lines


def _reasons(counts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
    return f" ({listed})" if listed else ""
