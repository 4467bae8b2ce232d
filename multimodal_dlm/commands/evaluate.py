"""The command that measures a pipeline on held-out data and writes a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.loading import RELEASED_PIPELINE, load, require_folder
from multimodal_dlm.commands.reporting import INCOMPLETE, Report, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from multimodal_dlm.datasets.manifest import Manifest
    from multimodal_dlm.evaluation.suites import Suite

SAMPLE_DATA = "datasets/sample.yaml"


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "pipeline", nargs="?", type=str, default=RELEASED_PIPELINE,
        help="folder of a saved pipeline, or `owner/name` on the Hub",
    )  # fmt: skip
    parser.add_function_arguments(run_evaluate, skip={"pipeline"}, as_group=False)


def run_evaluate(
    pipeline: str = RELEASED_PIPELINE,
    *,
    suite: str = "quick",
    manifest: str = SAMPLE_DATA,
    data_root: str | None = None,
    output: str = "out/evaluation",
    compare: str | None = None,
    only: str | None = None,
    limit: int | None = None,
    tasks: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> Report:
    """Measure a pipeline on held-out data; writes report.json and report.html.

    Measurements that fail are left out, with the reason, and the exit status is 1.
    With `compare` there are two, in `first` and `second` of the output.

    Args:
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        suite: default, quick, baselines, a YAML file, or data (all that the manifest allows)
        manifest: YAML file of a dataset or a mixture; the committed sample is too small to judge by
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        output: folder of the report; measurements found there are not taken again
        compare: folder of a second pipeline, measured into `second` of the output and shown beside
            the first; null for none
        only: names of measurements, or their beginnings, with commas between them; null for all
        limit: rows of each measurement at most; null for what the suite says
        tasks: tasks that the pipeline was trained for, such as caption,vqa,unconditional_text; what
            needs another one is left out, with the reason; null for all
        seed: of every draw
        batch_size: rows at once
        device: auto, cpu, cuda, cuda:1
    """
    from multimodal_dlm.datasets.manifest import open_manifest
    from multimodal_dlm.evaluation.suites import open_suite, suite_of_data

    data = open_manifest(manifest, data_root)
    chosen = suite_of_data(data) if suite == "data" else open_suite(suite)
    chosen = chosen.only(only.split(",") if only is not None else None).at_most(limit)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
    if tasks is not None:
        options["tasks"] = tasks.split(",")
    if compare is None:
        return measure_suite(pipeline, data, chosen, output, **options)
    require_folder(compare)
    folders = [(pipeline, Path(output) / "first"), (compare, Path(output) / "second")]
    measured = [
        measure_suite(each, data, chosen, str(folder), **options) for each, folder in folders
    ]
    from multimodal_dlm.evaluation.comparison import compare_reports, comparison_lines

    found = compare_reports(*(folder for _, folder in folders))
    lines = [f"{pipeline} | {compare}", *comparison_lines(found)]
    lines.append("* 95 % intervals that do not meet")
    for (each, _), report in zip(folders, measured, strict=True):
        lines += [f"{each}: {line}" for line in _failure_lines(report.values)]
    values = {
        "pipelines": [each for each, _ in folders],
        "metrics": {metric.name: metric.to_dict() for metric in found},
        "failed": [report.values["failed"] for report in measured],
    }
    return Report(values, "\n".join(lines), max(report.status for report in measured))


def measure_suite(
    pipeline: str,
    data: "Manifest",
    suite: "Suite",
    output: str,
    *,
    seed: int,
    batch_size: int,
    device: str,
    tasks: Sequence[str] | None = None,
) -> Report:
    """Load a pipeline, take a suite of it and show what came out.

    Args:
        pipeline: Folder, or `owner/name` on the Hub.
        data: Datasets that the suite names.
        suite: What is measured.
        output: Folder of the report.
        seed: Of every draw.
        batch_size: Rows at once.
        device: As `loading.load` takes it.
        tasks: What the pipeline was trained for; None for all.
    """
    require_folder(pipeline)
    folder, name = Path(pipeline).expanduser(), None
    if not folder.is_dir():
        from multimodal_dlm.pipelines.hub import fetch_folder

        # The files that are hashed are those that are loaded; a snapshot is named by its commit.
        folder = fetch_folder(pipeline)
        name = f"{pipeline}@{folder.name}"
    loaded = load("UnifiedImageToTextPipeline", str(folder), device)
    from multimodal_dlm.evaluation.harness import HTML_FILE, run_suite
    from multimodal_dlm.evaluation.html_report import metric_lines
    from multimodal_dlm.tasks import TASKS

    report = run_suite(
        loaded,
        data,
        suite,
        output,
        folder=folder,
        name=name,
        seed=seed,
        batch_size=batch_size,
        tasks=TASKS if tasks is None else tasks,
        progress=say,
    )
    left_out, failed = report["left_out"], report["failed"]
    seconds = sum(report["times"][e.name] for e in suite.entries if e.name not in left_out)
    lines = [f"{pipeline}, suite {suite.name}, data {data.name}"]
    lines += metric_lines(report["metrics"])
    own = {entry.name for entry in suite.entries}
    single = {each: value for each, value in report["times"].items() if each not in own}
    lines += [f"  {each}: {value:.4f} s" for each, value in single.items()]
    for each, reason in left_out.items():
        lines.append(f"  {each}: {'failed' if each in failed else 'left out'}, {reason}")
    lines.append(f"{seconds:.0f} s; {Path(output) / HTML_FILE}")
    lines += _failure_lines(report)
    return Report(report, "\n".join(lines), INCOMPLETE if failed else 0)


def _failure_lines(report: Mapping[str, Any]) -> list[str]:
    """One line that says which parts failed; none where none did."""
    failed = report["failed"]
    total = len(report["settings"]["measurements"])
    return [f"{len(failed)} of {total} parts failed: {', '.join(failed)}"] if failed else []
