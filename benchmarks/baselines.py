"""Does one diffusion backbone cost or gain? The models of configs/baselines in one table.

Each pipeline is measured by the suite `baselines` of the evaluation package (its reports lie in
`--output`, and a run that was cut off goes on from there); what a model was not trained for is left
out with the reason. Then pictures a second: all drawers take turns in one process with the exact
cache, in every number of steps that the suite judged, and the table says how fast each is in the
fewest steps whose alignment is at least that of the reference.

    OMP_NUM_THREADS=2 python benchmarks/baselines.py --data-root DATA --json out/baselines.json \\
        --pipelines unified=runs/baselines/unified/pipeline causal=runs/baselines/causal/pipeline \\
            understanding=runs/baselines/understanding/pipeline \\
            generation=runs/baselines/generation/pipeline
"""

import argparse
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from reporting import finish

from multimodal_dlm.commands.loading import load
from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.evaluation.comparison import compare_reports
from multimodal_dlm.evaluation.harness import run_suite
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.html_report import format_value
from multimodal_dlm.evaluation.measures.text_to_image import draw_pictures
from multimodal_dlm.evaluation.suites import Suite, open_suite
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.tasks import TASKS
from multimodal_dlm.training.config import load_train_config

ROOT = Path(__file__).parents[1]
ROLES = ("unified", "causal", "understanding", "generation")
DRAWN = "text_to_image.unseen_combinations"
ALIGNMENT = "name_at_5"  # By the image-text scorer: what "equal alignment" means.
# What the table shows, of all that the reports hold.
SHOWN = (
    "caption.unseen_combinations.exact",
    "caption.scenes.f1",
    "vqa.easy_vqa.accuracy",
    "vqa.emoji_scenes.accuracy",
    f"{DRAWN}.name_at_5",
    f"{DRAWN}.alignment_auc",
    f"{DRAWN}.own_at_1",
    f"{DRAWN}.own_at_5",
    f"{DRAWN}.kernel_distance",
    "text_to_image.scenes.count",
    "text_to_image.scenes.place",
    "text_to_image.scenes.relation",
    "likelihood.unseen_combinations.image_given_text_nats",
    "likelihood.unseen_combinations.text_given_image_nats",
    "likelihood.unseen_combinations.text_nats",
    "likelihood.unseen_combinations.auc",
    "likelihood.easy_vqa.image_given_text_nats",
)


def trained_tasks(role: str) -> list[str]:
    """The tasks that the config of a role trains, of `TASKS`, in their order."""
    manifest = load_train_config(ROOT / f"configs/baselines/{role}.yaml").data.manifest
    members = yaml.safe_load((ROOT / manifest).read_text(encoding="utf-8"))["mixture"]
    return [task for task in TASKS if any(task in member["tasks"] for member in members)]


def table(reports: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Any]) -> str:
    """A row for each shown metric: every model with its interval, then n and what costs nothing."""
    rows = [["metric", *reports, "n", "baselines"]]
    for name in SHOWN:
        found = [report["metrics"].get(name) for report in reports.values()]
        some = next((metric for metric in found if metric is not None), None)
        if some is None:
            continue
        beside = ", ".join(f"{who} {format_value(v)}" for who, v in some["baselines"].items())
        rows.append([name, *map(_cell, found), str(some["n"]), beside])
    if speed:
        cells = [_speed(speed["equal_alignment"], role) for role in reports]
        rows.append([f"pictures/s, alignment of {speed['reference']}", *cells, "", ""])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    interval = ""
    if metric["low"] is not None:
        interval = f" [{format_value(metric['low'])}, {format_value(metric['high'])}]"
    return f"{format_value(metric['value'])}{interval}"


def _speed(found: Mapping[str, Mapping[str, Any] | None], role: str) -> str:
    if role not in found:
        return "-"
    each = found[role]
    if each is None:
        return "not reached"
    return f"{each['pictures_per_second']:.3g} in {each['steps']} steps"


def drawing_settings(
    reports: Mapping[str, Mapping[str, Any]], pipes: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Model -> numbers of steps it was judged in, each with its alignment, fewest first.

    A causal model has one entry, `steps` None: a forward for each token. Another that was judged in
    no `drawing.*` has the steps of its pictures in `DRAWN`.
    """
    call = inspect.signature(UnifiedTextToImagePipeline.__call__)
    default = call.parameters["num_inference_steps"].default
    found: dict[str, list[dict[str, Any]]] = {}
    for role, report in reports.items():
        described, metrics = report["settings"]["measurements"], report["metrics"]
        entries = [name for name in described if name.startswith("drawing.")]
        judged = [name for name in entries if f"{name}.{ALIGNMENT}" in metrics]
        if judged:
            settings = [
                {
                    "steps": described[name]["num_inference_steps"],
                    ALIGNMENT: metrics[f"{name}.{ALIGNMENT}"],
                }
                for name in judged
            ]
            found[role] = sorted(settings, key=lambda each: each["steps"])
        elif f"{DRAWN}.{ALIGNMENT}" in metrics:
            is_causal = pipes[role].processor.layout["condition_attention"] == "causal"
            steps = described.get(DRAWN, {}).get("num_inference_steps", default)
            steps = None if is_causal else steps
            found[role] = [{"steps": steps, ALIGNMENT: metrics[f"{DRAWN}.{ALIGNMENT}"]}]
    return found


def time_drawing(
    pipes: Mapping[str, Any],
    settings: Mapping[str, Sequence[dict[str, Any]]],
    data: HeldOut,
    repeats: int,
) -> None:
    """Add pictures a second to each setting: median of interleaved rounds, one warm-up before."""
    prompts = [sample.record.captions[0] for sample in data.samples()]
    calls = [(role, each) for role, some in settings.items() for each in some]
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 1):
        for place, (role, each) in enumerate(calls):
            steps = {} if each["steps"] is None else {"num_inference_steps": each["steps"]}
            start = time.perf_counter()
            draw_pictures(pipes[role], prompts, data, **steps)
            if number:
                seconds[place].append(time.perf_counter() - start)
    for (role, each), times in zip(calls, seconds, strict=True):
        if each["steps"] is None:
            each["steps"] = pipes[role].processor.layout["max_window"]["image"]
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        each["pictures_per_second"] = round(len(prompts) / statistics.median(times), 4)
        each["seconds_quartiles"] = [round(value, 4) for value in quartiles]


def equal_alignment(
    settings: Mapping[str, Sequence[Mapping[str, Any]]], reference: str
) -> dict[str, Mapping[str, Any] | None]:
    """For each model its fastest setting that aligns no worse than the reference, in the mean."""
    best = max(each[ALIGNMENT]["value"] for each in settings[reference])
    found: dict[str, Mapping[str, Any] | None] = {}
    for role, some in settings.items():
        good = [each for each in some if each[ALIGNMENT]["value"] >= best]
        found[role] = max(good, key=lambda each: each["pictures_per_second"], default=None)
    return found


def measure(
    folders: Mapping[str, str], manifest: Manifest, suite: Suite, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report and pipeline of each model."""
    reports, pipes = {}, {}
    for role, folder in folders.items():
        pipes[role] = load("UnifiedTextToImagePipeline", folder, args.device)
        reports[role] = run_suite(
            pipes[role],
            manifest,
            suite,
            Path(args.output) / role,
            folder=folder,
            seed=args.seed,
            tasks=trained_tasks(role),
            progress=lambda text, role=role: print(f"{role}: {text}", flush=True),
        )
    return reports, pipes


def compared(folders: Mapping[str, str], output: Path, reference: str) -> dict[str, Any]:
    """Every other model beside the reference: the metrics they have in common."""
    return {
        role: {
            metric.name: metric.to_dict()
            for metric in compare_reports(output / reference, output / role)
        }
        for role in folders
        if role != reference
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pipelines", nargs="+", required=True, metavar="ROLE=FOLDER")
    parser.add_argument("--manifest", default=str(ROOT / "datasets/baselines.yaml"))
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--suite", default="baselines")
    parser.add_argument("--only", default=None, help="names of measurements, or their beginnings")
    parser.add_argument("--limit", type=int, default=None, help="rows of each measurement at most")
    parser.add_argument("--output", default="out/baselines", help="folder of the reports")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of a timed call")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)
    args.folders = dict(each.partition("=")[::2] for each in args.pipelines)
    for role in args.folders:
        if role not in ROLES:
            parser.error(f"a role must be one of {', '.join(ROLES)}; got `{role}`")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    manifest = open_manifest(args.manifest, args.data_root)
    only = args.only.split(",") if args.only is not None else None
    suite = open_suite(args.suite).only(only).at_most(args.limit)
    reports, pipes = measure(args.folders, manifest, suite, args)
    first = next(iter(args.folders))
    speed: dict[str, Any] = {}
    settings = drawing_settings(reports, pipes)
    if settings:
        data = HeldOut(
            manifest.sources["emoji"], "unseen_combinations",
            limit=args.pictures, batch_size=args.pictures, seed=args.seed,
        )  # fmt: skip
        drawers = {role: UnifiedTextToImagePipeline.from_pipe(pipes[role]) for role in settings}
        for drawer in drawers.values():
            drawer.set_progress_bar_config(disable=True)
        time_drawing(drawers, settings, data, args.repeats)
        reference = "causal" if "causal" in settings else next(iter(settings))
        speed = {
            "pictures": args.pictures,
            "repeats": args.repeats,
            "alignment": f"{ALIGNMENT} of the image-text scorer",
            "reference": reference,
            "settings": settings,
            "equal_alignment": equal_alignment(settings, reference),
        }
    print(table(reports, speed))
    finish(
        {
            "benchmark": "baselines",
            "suite": suite.name,
            "seed": args.seed,
            "tasks": {role: trained_tasks(role) for role in args.folders},
            "metrics": {role: report["metrics"] for role, report in reports.items()},
            "left_out": {role: report["left_out"] for role, report in reports.items()},
            "against": first,
            "compared": compared(args.folders, Path(args.output), first),
            "speed": speed,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
