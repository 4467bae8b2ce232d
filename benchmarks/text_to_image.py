"""Seconds a picture of the text-to-image pipeline, beside a research loop and Diffusers' aMUSEd.

In the same rounds of one process, at every batch size:

ours                                 the pipeline in the dtype and steps asked for
ours_default                         the pipeline as `from_pretrained` gives it and its call draws
ours_N_steps                         ours in N steps
research_loop                        the same weights and tokenizers in `research_loop.py`: float32,
                                     16 steps, two forwards a step over the whole row, logits of all
                                     positions over the whole vocabulary
research_loop_same_dtype_and_steps   that loop in the dtype and steps of ours
amused                               Diffusers' AmusedPipeline, random weights, as many backbone
                                     parameters, 64 image tokens, dtype, steps and guidance of ours

`ratios` are their median seconds a picture over ours at the largest batch. With `--quality`,
held-out prompts are drawn by the loop and by ours in several numbers of steps, and judged.

    OMP_NUM_THREADS=2 python benchmarks/text_to_image.py --json out/text_to_image.json
    OMP_NUM_THREADS=2 python benchmarks/text_to_image.py --repeats 0 --quality --data-root DATA_ROOT
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from amused import encode, make_amused
from drawing_quality import Drawer, Judge, drawn_once
from reporting import finish
from research_loop import ResearchLoop
from torch.profiler import ProfilerActivity, profile

from multimodal_dlm.datasets.manifest import open_manifest
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline

ROOT = Path(__file__).parents[1]
PROMPT = "a noto emoji of a red apple"
CALL = inspect.signature(UnifiedTextToImagePipeline.__call__).parameters
DEFAULT_STEPS: int = CALL["num_inference_steps"].default
GUIDANCE_SCALE: float = CALL["guidance_scale"].default
PROFILE_ROWS = 20
DENOMINATORS = {
    "research_loop": f"research_loop.py, float32, {DEFAULT_STEPS} steps; weights, tokenizers,"
    " guidance and batch of ours",
    "research_loop_same_dtype_and_steps": "research_loop.py in the dtype and steps of ours",
    "amused": "diffusers.AmusedPipeline called as it is, text encoder included, random weights,"
    " dtype, steps and guidance of ours, one forward a step over both branches",
}

Run = Callable[[int], Any]


def seeded() -> torch.Generator:
    """The generator of every call."""
    return torch.Generator().manual_seed(0)


def load(folder: str, dtype: torch.dtype) -> Any:
    """The saved pipeline in one dtype, without a progress bar."""
    pipeline = UnifiedTextToImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def num_parameters(module: torch.nn.Module) -> int:
    """Of a module."""
    return sum(weight.numel() for weight in module.parameters())


def make_loop(pipeline: Any, dtype: torch.dtype, steps: int) -> ResearchLoop:
    """The research loop at the guidance of our call."""
    return ResearchLoop(pipeline, dtype=dtype, num_steps=steps, guidance_scale=GUIDANCE_SCALE)


def make_runs(args: argparse.Namespace) -> tuple[dict[str, Run], Any, Any]:
    """What is timed, by name, as functions of the batch size; then ours and aMUSEd's pipelines."""
    dtype = getattr(torch, args.dtype)
    default, ours = load(args.pipeline, torch.float32), load(args.pipeline, dtype)
    amused = make_amused(
        width=ours.transformer.config["hidden_size"],
        num_codes=ours.image_tokenizer.codebook_sizes[0],
        num_parameters=num_parameters(ours.transformer),
        image_size=ours.image_size,
    ).to(dtype)

    def draw(pipeline: Any, batch: int, **options: Any) -> Any:
        return pipeline([PROMPT] * batch, generator=seeded(), **options)

    runs: dict[str, Run] = {
        "ours": partial(draw, ours, num_inference_steps=args.steps),
        "ours_default": partial(draw, default),
        "research_loop": partial(draw, make_loop(default, torch.float32, DEFAULT_STEPS)),
        "research_loop_same_dtype_and_steps": partial(draw, make_loop(ours, dtype, args.steps)),
        "amused": partial(
            draw, amused, num_inference_steps=args.steps, guidance_scale=GUIDANCE_SCALE
        ),
        "amused_text_encoder": lambda batch: encode(amused, [PROMPT] * batch),
    }
    for steps in args.curve:
        runs[f"ours_{steps}_steps"] = partial(draw, ours, num_inference_steps=steps)
    return runs, ours, amused


def time_runs(
    runs: dict[str, Run], batches: Sequence[int], repeats: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds a picture of every run and batch, interleaved; the first round is warm-up."""
    seconds: dict[tuple[str, int], list[float]] = {
        (name, batch): [] for batch in batches for name in runs
    }
    for round_number in range(repeats + 1):
        for name, batch in seconds:
            start = time.perf_counter()
            runs[name](batch)
            if round_number:
                seconds[name, batch].append((time.perf_counter() - start) / batch)
    return seconds


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios, medians and interquartile ranges, and the operators of one step."""
    runs, ours, amused = make_runs(args)
    seconds = time_runs(runs, args.batches, args.repeats)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    by_batch = {
        str(batch): {
            name: round(median[name, batch] / median["ours", batch], 3) for name in DENOMINATORS
        }
        for batch in args.batches
    }
    return {
        "ratios": by_batch[str(max(args.batches))],
        "ratios_by_batch": by_batch,
        "denominators": DENOMINATORS,
        "ours": {"dtype": args.dtype, "steps": args.steps, "guidance_scale": GUIDANCE_SCALE},
        "seconds_per_picture": [
            {
                "run": name,
                "batch": batch,
                "median": round(median[name, batch], 5),
                "quartiles": [round(value, 5) for value in quartiles(values)],
                "all": [round(value, 5) for value in values],
            }
            for (name, batch), values in seconds.items()
        ],
        "parameters": {
            "backbone": num_parameters(ours.transformer),
            "image_decoder": num_parameters(ours.image_tokenizer.decoder),
            "amused_backbone": num_parameters(amused.transformer),
            "amused_image_decoder": num_parameters(amused.vqvae.decoder),
            "amused_text_encoder": num_parameters(amused.text_encoder),
        },
        "one_step": [profile_step(runs["ours"], batch, args.steps) for batch in args.batches],
    }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; those of one value are the value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def profile_step(run: Run, batch: int, steps: int) -> dict[str, Any]:
    """Operators of a call, divided by its steps: encoding the prompt and decoding included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(batch)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return {
        "batch": batch,
        "operators": round(sum(row.count for row in rows) / steps, 1),
        "rows": [
            {
                "operator": row.key,
                "calls": round(row.count / steps, 1),
                "share": round(row.self_cpu_time_total / total, 4),
            }
            for row in rows[:PROFILE_ROWS]
        ],
    }


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Metrics of pictures of unseen combinations, by the loop and by ours."""
    source = open_manifest(args.manifest, args.data_root).sources[args.source]
    data = HeldOut(source, args.split, args.limit, batch_size=max(args.batches))
    drawers = make_drawers(args)
    judge = Judge(data, args.scorer, args.num_train)
    drawn = {
        name: drawn_once(drawer, judge.prompts, data, args.drawn / name)
        for name, drawer in drawers.items()
    }
    return {
        "source": args.source,
        "split": args.split,
        "prompts": len(judge.prompts),
        "seed": data.seed,
        "num_train": args.num_train,
        "drawers": {name: dict(drawer.settings) for name, drawer in drawers.items()},
        "metrics": judge.compare(drawn, "research_loop"),
    }


def make_drawers(args: argparse.Namespace) -> dict[str, Drawer]:
    """The loop, the pipeline as it is loaded, and ours by steps and plan."""
    dtype = getattr(torch, args.dtype)
    default, ours = load(args.pipeline, torch.float32), load(args.pipeline, dtype)
    shared = {"guidance_scale": GUIDANCE_SCALE, "weights": default.model_fingerprint}
    loop = {"dtype": "float32", "steps": DEFAULT_STEPS, "plan": "cosine", **shared}
    drawers = {
        "research_loop": Drawer(make_loop(default, torch.float32, DEFAULT_STEPS), loop),
        "ours_default": Drawer(default, {**loop, "by": "ours"}),
    }
    profile_values = json.loads(args.step_plan.read_text())["values"]
    for plan, values in (("cosine", None), ("step_profile", profile_values)):
        pipeline = with_profile(ours, values)
        for steps in args.candidates:
            settings = {"dtype": args.dtype, "steps": steps, "plan": plan, **shared}
            draw = partial(pipeline, num_inference_steps=steps)
            drawers[f"{args.dtype}_{steps}_{plan}"] = Drawer(draw, settings)
    return drawers


def with_profile(pipeline: Any, values: list[float] | None) -> Any:
    """The same pipeline with the steps of pictures planned from an information profile."""
    modalities = dict(pipeline.scheduler.config["modalities"])
    modalities["image"] = {**modalities["image"], "step_profile": values}
    scheduler = type(pipeline.scheduler)(modalities=modalities)
    planned: Any = UnifiedTextToImagePipeline.from_pipe(pipeline, scheduler=scheduler)
    planned.set_progress_bar_config(disable=True)
    return planned


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pipeline", default=str(ROOT / "pipelines" / "emoji-small"), help="saved pipeline")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of ours")
    add("--steps", type=int, default=DEFAULT_STEPS, help="of ours")
    add("--curve", type=int, nargs="*", default=[4, 8, 12], help="also time ours in these steps")
    add("--batches", type=int, nargs="+", default=[1, 16])
    add("--repeats", type=int, default=5, help="rounds; 0 times nothing")
    add("--json", type=Path, help="file to write the report to")
    add("--quality", action="store_true", help="also draw and judge held-out prompts")
    add("--candidates", type=int, nargs="+", default=[8, 10, 12, 16], help="steps to judge")
    add("--manifest", default=str(ROOT / "datasets" / "emoji.yaml"))
    add("--data-root", help="folder the datasets were built in")
    add("--source", default="emoji")
    add("--split", default="unseen_combinations")
    add("--limit", type=int, default=300, help="prompts")
    add("--num-train", type=int, default=4000, help="pictures the probes are fitted to")
    add("--scorer", default=str(ROOT / "scorers" / "emoji"))
    add("--step-plan", type=Path, default=ROOT / "benchmarks" / "results" / "step_plan.json")
    add("--drawn", type=Path, default=Path("out") / "drawn", help="where pictures are kept")
    args = parser.parse_args()
    report: dict[str, Any] = {"pipeline": Path(args.pipeline).name, "repeats": args.repeats}
    if args.repeats:
        report |= timing(args)
    if args.quality:
        report["quality"] = quality(args)
    finish(report, args.json)


if __name__ == "__main__":
    main()
