"""Two reports side by side: each metric with both intervals, and whether they are apart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.harness import FORMAT, REPORT_FILE
from multimodal_dlm.evaluation.html_report import format_value

COMPARED = ("suite", "seed", "measurements", "manifest")  # Of the settings; must be the same.


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of two reports.

    Args:
        name: Dotted name.
        first: As in `report.json`: value, low, high, n, baselines.
        second: The same of the second report.
    """

    name: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]

    @property
    def is_apart(self) -> bool | None:
        """Whether the intervals do not meet; None where one has none.

        Intervals that meet do not say that the two are the same: both reports look at the same
        rows, so a difference may be surer than two intervals let one see.
        """
        ends = [each[end] for each in (self.first, self.second) for end in ("low", "high")]
        if any(end is None for end in ends):
            return None
        return ends[1] < ends[2] or ends[3] < ends[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        difference = round(self.second["value"] - self.first["value"], 5)
        return {
            "first": dict(self.first),
            "second": dict(self.second),
            "difference": difference,
            "is_apart": self.is_apart,
        }


def compare_reports(first: str | Path, second: str | Path) -> list[ComparedMetric]:
    """The metrics that two reports have in common, in the order of the first.

    Args:
        first: `report.json`, or the folder that holds it.
        second: The same.

    Raises:
        DataError: When a file is no report, or the two measured different things.
    """
    reports = [_read(path) for path in (first, second)]
    for name in COMPARED:
        one, other = (report["settings"][name] for report in reports)
        if one != other:
            raise DataError(
                f"Two reports must have the same `{name}` to be compared; `{first}` and `{second}`"
                " have not. Measure both with the same suite, data, limit and seed."
            )
    metrics = [report["metrics"] for report in reports]
    return [
        ComparedMetric(name, metrics[0][name], metrics[1][name])
        for name in metrics[0]
        if name in metrics[1]
    ]


def comparison_lines(metrics: Sequence[ComparedMetric]) -> list[str]:
    """A line for each metric: both values with intervals; a star where these do not meet."""
    width = max((len(metric.name) for metric in metrics), default=0) + 2
    return [
        f"{'*' if metric.is_apart else ' '} {metric.name:<{width}}{_cell(metric.first):<28}"
        f"{_cell(metric.second)}"
        for metric in metrics
    ]


def _cell(values: Mapping[str, Any]) -> str:
    interval = ""
    if values["low"] is not None:
        interval = f" [{format_value(values['low'])}, {format_value(values['high'])}]"
    return f"{format_value(values['value'])}{interval}"


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        is_report = report["format"] == FORMAT and set(COMPARED) <= set(report["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        is_report, report = False, {}
    if not is_report:
        raise DataError(
            f"`{file}` must be the `{REPORT_FILE}` of an evaluation ({FORMAT}); it is not. Run"
            " `multimodal-dlm evaluate` first."
        )
    return report
