"""What every cache changes in pictures, and seconds a picture with each.

Text-to-image by a saved pipeline in float32. Divergence, one prompt at a time: on the states of the
run without a cache the guided logits with the cache against those without, at every masked position
of every step (KL in nats, mean and 95th percentile; share of positions with the same likeliest
token), and the first step after which a run of the cache's own holds other tokens; once with the
conditioning on noise levels and once without. Seconds: whole calls of the pipeline with the same
prompt, in interleaved rounds of one process; `columns` is the share of a run without a cache.

    OMP_NUM_THREADS=2 python benchmarks/cached_pictures.py --json out/cached_pictures.json
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import finish
from text_to_image import DEFAULT_STEPS, GUIDANCE_SCALE, PROMPT, load, quartiles, time_runs

from multimodal_dlm.datasets.manifest import open_manifest
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.evaluation.cache_divergence import CacheDivergence, cache_divergence
from multimodal_dlm.models.approximate_cache import (
    ConfidenceCacheConfig,
    DelayedCacheConfig,
    DualCacheConfig,
    FeatureCacheConfig,
    PrefixCacheConfig,
)
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.pipelines.denoising import denoise
from multimodal_dlm.pipelines.guidance import classifier_free

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "datasets" / "sample"
CAPTION = 1  # The caption that names concept and artist.
CACHES: dict[str, Any] = {
    "exact": ExactCacheConfig(),
    "prefix": PrefixCacheConfig(),
    "dual": DualCacheConfig(),
    "delayed": DelayedCacheConfig(),
    "feature": FeatureCacheConfig(),
    "confidence_0.9": ConfidenceCacheConfig(),
    "confidence_0.5": ConfidenceCacheConfig(threshold=0.5),
}


def read_prompts(count: int) -> list[str]:
    """Held-out prompts of the committed sample."""
    source = open_manifest(str(SAMPLE / "emoji.yaml"), str(SAMPLE)).sources["emoji"]
    return [sample.record.captions[CAPTION] for sample in first_samples(source, "test", count)]


def divergence(pipe: Any, prompts: Sequence[str], steps: int, *, conditioned: bool) -> Any:
    """Each cache over all prompts, one row at a time."""
    parts: dict[str, list[CacheDivergence]] = {name: [] for name in CACHES}
    branches = classifier_free(pipe.processor.unconditional, GUIDANCE_SCALE)
    for seed, prompt in enumerate(prompts):
        canvas = pipe.processor.text_to_image([prompt])
        run = partial(
            denoise,
            pipe.transformer,
            pipe.scheduler,
            canvas,
            num_inference_steps=steps,
            row_seeds=[seed],
            branches=branches,
        )
        found = cache_divergence(
            pipe.transformer,
            CACHES,
            canvas,
            lambda callback, run=run: run(callback=callback),
            noise_conditioning=conditioned,
        )
        for name, part in found.items():
            parts[name].append(part)
    return {name: summary(CacheDivergence.join(part)) for name, part in parts.items()}


def summary(found: CacheDivergence) -> dict[str, Any]:
    """The numbers of the table."""
    steps = [step for step in found.first_divergences if step is not None]
    return {
        "kl_mean": float(f"{found.kl_mean:.3g}"),
        "kl_p95": float(f"{found.kl_p95:.3g}"),
        "argmax_agreement": round(found.argmax_agreement, 5),
        "first_divergence_median": statistics.median(steps) if steps else None,
        "runs_alike": len(found.first_divergences) - len(steps),
        "runs": len(found.first_divergences),
        "positions": found.num_positions,
    }


def seconds(pipe: Any, batches: Sequence[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds a picture and columns computed, by cache and batch."""
    model = pipe.transformer
    columns: dict[tuple[str, int], int] = {}

    def draw(name: str, config: Any, batch: int) -> None:
        counted: list[int] = []
        handle = model.blocks[0].register_forward_pre_hook(
            lambda _, inputs: counted.append(inputs[0].shape[0] * inputs[0].shape[1])
        )
        if config is not None:
            model.enable_cache(config)
        try:
            generator = [torch.Generator().manual_seed(seed) for seed in range(batch)]
            pipe([PROMPT] * batch, num_inference_steps=steps, generator=generator)
        finally:
            model.disable_cache()
            handle.remove()
        columns[name, batch] = sum(counted)

    settings: Mapping[str, Any] = {"no_cache": None, **CACHES}
    runs = {name: partial(draw, name, config) for name, config in settings.items()}
    found = time_runs(runs, batches, repeats)
    return [
        {
            "cache": name,
            "batch": batch,
            "median": round(statistics.median(values), 5),
            "quartiles": [round(value, 5) for value in quartiles(values)],
            "columns": round(columns[name, batch] / columns["no_cache", batch], 4),
            "all": [round(value, 5) for value in values],
        }
        for (name, batch), values in found.items()
    ]


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pipeline", default=str(ROOT / "pipelines" / "emoji-small"), help="saved pipeline")
    add("--steps", type=int, default=DEFAULT_STEPS)
    add("--prompts", type=int, default=24, help="for the divergence; 0 leaves it out")
    add("--conditioning", nargs="+", choices=("on", "off"), default=["on", "off"])
    add("--batches", type=int, nargs="+", default=[1, 8], help="to time")
    add("--repeats", type=int, default=5, help="rounds; 0 times nothing")
    add("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    pipe = load(args.pipeline, torch.float32)
    report: dict[str, Any] = {
        "pipeline": Path(args.pipeline).name,
        "attention": pipe.transformer.layout["condition_attention"],
        "dtype": "float32",
        "steps": args.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "caches": {name: repr(config) for name, config in CACHES.items()},
    }
    if args.repeats:
        report["seconds_per_picture"] = seconds(pipe, args.batches, args.steps, args.repeats)
    if args.prompts:
        prompts = read_prompts(args.prompts)
        report["divergence"] = {
            f"noise_conditioning_{state}": divergence(
                pipe, prompts, args.steps, conditioned=state == "on"
            )
            for state in args.conditioning
        }
    finish(report, args.json)


if __name__ == "__main__":
    main()
