"""What a measure gives: metrics with intervals and baselines, sheets, tables and curves."""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from PIL import Image

from multimodal_dlm.errors import unknown_name
from multimodal_dlm.evaluation.bootstrap import bootstrap_interval
from multimodal_dlm.tasks import TASKS

DIGITS = 5
NO_SCORE_IN_BLOCKS = (
    "texts that are written in blocks have no `pipe.score`; read `eval/nelbo` of the training run"
)


@dataclass(frozen=True)
class Metric:
    """One number with what it must be read beside.

    Args:
        value: The number.
        low: Lower end of its 95 % interval; None where there is none.
        high: Upper end.
        n: Rows it was taken over.
        baselines: Name -> what costs nothing: chance, majority, blind, nearest neighbour.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    baselines: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, five digits after the point."""
        return {
            "value": _rounded(self.value),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "n": self.n,
            "baselines": {name: _rounded(value) for name, value in self.baselines.items()},
        }


def mean_metric(
    values: Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    baselines: Mapping[str, Sequence[float] | float] | None = None,
    seed: int = 0,
) -> Metric:
    """A mean over rows with its bootstrap interval.

    Args:
        values: One number a row.
        groups: Unit of each row, see `bootstrap_interval`.
        baselines: The same rows by a baseline, or its number.
        seed: Of the bootstrap.
    """
    rows = [float(value) for value in values]
    low, high = bootstrap_interval(rows, groups=groups, seed=seed)
    found = {}
    for name, baseline in (baselines or {}).items():
        is_number = isinstance(baseline, int | float)
        found[name] = float(baseline) if is_number else sum(map(float, baseline)) / len(baseline)
    return Metric(sum(rows) / len(rows), low, high, len(rows), found)


@dataclass(frozen=True)
class Table:
    """Counts, drawn as a heat map.

    Args:
        rows: Names of the rows, such as true answers.
        columns: Names of the columns, such as given answers.
        counts: One list of counts a row.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Curve:
    """Lines over one x.

    Args:
        x_label: Name and unit of x.
        y_label: Name and unit of y.
        x: Where it was measured.
        lines: Name -> what was found there.
    """

    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measurement:
    """Result of one measure.

    Args:
        metrics: Name -> metric; the suite puts its own name before it.
        sheets: Title -> picture.
        tables: Title -> counts.
        curves: Title -> line.
        times: Name -> seconds. They go to the report's `times`: two runs need not agree on them.
    """

    metrics: Mapping[str, Metric]
    sheets: Mapping[str, Image.Image] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sheets, as JSON values."""
        return {
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
            "tables": {title: asdict(table) for title, table in self.tables.items()},
            "curves": {title: asdict(curve) for title, curve in self.curves.items()},
            "times": {name: _rounded(seconds) for name, seconds in self.times.items()},
        }


@dataclass(frozen=True)
class Measure:
    """A function that measures, and the pipeline it wants.

    Args:
        name: Name in suites.
        pipeline: Class of `multimodal_dlm.pipelines` it is handed.
        function: (pipeline, data, *, ...) -> `Measurement`, data a `HeldOut`. One that takes
            `tasks` is told what the model was trained for.
        needs: Groups of tasks: it can be taken of models that were trained for all of a group. None
            asks nothing of a model.
        only_diffusion: Why it says nothing of a model that writes token by token; None where it
            does.
        only_whole_texts: Why it cannot be taken of a model that writes texts in blocks; None where
            it can.
        weights: Package with weights of a judge -> option that asks for it, None where it is always
            needed.
    """

    name: str
    pipeline: str
    function: Callable[..., Measurement]
    needs: tuple[tuple[str, ...], ...] = ()
    only_diffusion: str | None = None
    only_whole_texts: str | None = None
    weights: Mapping[str, str | None] = field(default_factory=dict)

    def reason_against(
        self,
        options: Mapping[str, Any],
        tasks: Collection[str],
        *,
        is_causal: bool,
        writes_blocks: bool = False,
    ) -> str | None:
        """Why it does not apply to a model, in words; None where it does.

        Args:
            options: Arguments that a suite gives it.
            tasks: What the model was trained for, of `tasks.TASKS`.
            is_causal: Whether the model writes token by token.
            writes_blocks: Whether it writes a text in blocks of several tokens.
        """
        if self.needs and not any(set(group) <= set(tasks) for group in self.needs):
            wanted = " or ".join(" and ".join(group) for group in self.needs)
            return f"it needs a model trained for {wanted}; this one is for {', '.join(tasks)}"
        if is_causal and self.only_diffusion is not None:
            return self.only_diffusion
        if is_causal and "num_inference_steps" in options:
            return "a causal model takes one step a token, whatever is asked for"
        return self.only_whole_texts if writes_blocks else None

    def missing_weights(self, options: Mapping[str, Any]) -> list[str]:
        """Packages that it would look for in vain.

        Args:
            options: Arguments that a suite gives it.
        """
        return [
            package
            for package, option in self.weights.items()
            if (option is None or options.get(option)) and find_spec(package) is None
        ]


_MEASURES: dict[str, Measure] = {}


def register_measure(
    name: str,
    pipeline: str,
    *needs: Sequence[str],
    only_diffusion: str | None = None,
    only_whole_texts: str | None = None,
    weights: Mapping[str, str | None] | None = None,
) -> Callable[[Callable[..., Measurement]], Callable[..., Measurement]]:
    """Name a function for suites.

    Args:
        name: Name in suites.
        pipeline: Class of `multimodal_dlm.pipelines` it is handed.
        needs: See `Measure`.
        only_diffusion: See `Measure`.
        only_whole_texts: See `Measure`.
        weights: See `Measure`.

    Raises:
        ConfigError: When a task does not exist.
    """
    for task in (task for group in needs for task in group):
        if task not in TASKS:
            raise unknown_name(f"task of measure `{name}`", task, TASKS)

    def register(function: Callable[..., Measurement]) -> Callable[..., Measurement]:
        groups = tuple(tuple(group) for group in needs)
        _MEASURES[name] = Measure(
            name, pipeline, function, groups, only_diffusion, only_whole_texts, weights or {}
        )
        return function

    return register


def get_measure(name: str) -> Measure:
    """A measure by name: every file of `evaluation/measures` is looked into.

    Raises:
        ConfigError: When there is none of that name.
    """
    package = importlib.import_module("multimodal_dlm.evaluation.measures")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    if name not in _MEASURES:
        raise unknown_name("measure", name, sorted(_MEASURES))
    return _MEASURES[name]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)
