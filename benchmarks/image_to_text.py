"""Captions and answers with and without the exact cache: seconds, ratios, identity of the ids.

Rows: one caption at 16 steps with 64 and 256 image tokens, captions of eight pictures in one call,
and eight questions about one picture.
The picture and the question are the prefix, computed once a call with the cache and at every step
without it. Settings are interleaved in one process; each figure is the median, with the quartiles
beside it. `step` says where one step of the first row goes after the first. Without `--pipeline`
the backbone of the released size has random weights, which take as long; 256 tokens always have
random weights. Codes are given, so the image tokenizer takes no part.

    OMP_NUM_THREADS=2 python benchmarks/image_to_text.py --json out/image_to_text.json
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from reporting import finish
from step_parts import OperatorCount, step_parts

from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import load_text_tokenizer
from multimodal_dlm.training.components import build_vocabulary

ROOT = Path(__file__).parents[1]
NUM_STEPS = 16
CAPTION_LENGTH = 16
QUESTIONS = [
    "what colour is the shape?", "what shape is present?", "is there a red shape?",
    "is there a circle?", "is there a blue triangle?", "is there not a green rectangle?",
    "does the image contain a square?", "what is this?",
]  # fmt: skip


def random_pipeline(side: int) -> UnifiedImageToTextPipeline:
    """A backbone of the released size over side x side image tokens, all weights random."""
    text = load_text_tokenizer(ROOT / "tokenizers" / "text")
    released: Any = ImageTokenizer.from_pretrained(
        ROOT / "tokenizers" / "image", dtype=torch.float32
    )
    torch.manual_seed(0)
    config = {**released.config, "image_size": 8 * side, "fingerprint": None}
    image: Any = ImageTokenizer.from_config(config)
    image.mark_released()
    transformer = UnifiedTransformerModel(
        vocabulary=build_vocabulary(text, image).to_dict(),
        layout=make_layout(max_text=40, num_image_tokens=side * side),
        **get_preset("small"),
    )
    return UnifiedImageToTextPipeline(
        transformer=transformer.eval(),
        scheduler=ConfidenceScheduler(),
        tokenizer=text,
        image_tokenizer=image.eval(),
    )


def caption(pipeline: Any, codes: Any, **options: Any) -> Any:
    """A caption of each picture; returns their ids."""
    return pipeline(
        codes=codes, gen_length=CAPTION_LENGTH, num_inference_steps=NUM_STEPS, **options
    ).sequences


def answers(pipeline: Any, codes: Any) -> Any:
    """Eight answers about one picture in one call; returns their ids."""
    rows = tuple(level.repeat(len(QUESTIONS), 1, 1) for level in codes)
    return pipeline(codes=rows, question=QUESTIONS, num_inference_steps=NUM_STEPS).sequences


@contextmanager
def cache(pipeline: Any, is_on: bool) -> Iterator[None]:
    """The exact cache of this call alone, or none."""
    if is_on:
        pipeline.transformer.enable_cache(ExactCacheConfig())
    yield
    pipeline.transformer.disable_cache()


def measure(repeats: int, pipelines: dict[int, Any]) -> list[dict[str, Any]]:
    """Seconds, forwards and operators of every row, cached and not; the first round is warm-up."""
    rows = {
        "caption_64_tokens": (8, 1, caption),
        "caption_256_tokens": (16, 1, caption),
        "eight_captions_64_tokens": (8, 8, caption),
        "eight_captions_256_tokens": (16, 8, caption),
        "eight_questions_64_tokens": (8, 1, answers),
    }
    draw = torch.Generator().manual_seed(0)
    codes = {side: torch.randint(0, 2560, (8, side, side), generator=draw) for side in pipelines}
    seconds: dict[tuple[str, bool], list[float]] = {}
    ids: dict[tuple[str, bool], Any] = {}
    for round_number in range(repeats + 1):
        for name, (side, count, run) in rows.items():
            for has_cache in (False, True):
                with cache(pipelines[side], has_cache):
                    start = time.perf_counter()
                    ids[name, has_cache] = run(pipelines[side], (codes[side][:count],))
                    taken = time.perf_counter() - start
                if round_number:
                    seconds.setdefault((name, has_cache), []).append(taken)
    report = []
    for name, (side, count, run) in rows.items():
        whole, kept = seconds[name, False], seconds[name, True]
        row: dict[str, Any] = {
            "row": name,
            "seconds_full_recompute": round(statistics.median(whole), 4),
            "seconds_exact_cache": round(statistics.median(kept), 4),
            "quartiles_full_recompute": quartiles(whole),
            "quartiles_exact_cache": quartiles(kept),
            "ratio": round(statistics.median(whole) / statistics.median(kept), 3),
            "identical_ids": bool(torch.equal(ids[name, False], ids[name, True])),
        }
        for has_cache, key in ((False, "full_recompute"), (True, "exact_cache")):
            with cache(pipelines[side], has_cache), OperatorCount() as counter:
                run(pipelines[side], (codes[side][:count],))
            row[f"operators_{key}"] = counter.total
        report.append({**row, "forwards": pipelines[side].num_forwards})
    return report


def quartiles(values: list[float]) -> list[float]:
    """The first and the third quartile."""
    parts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(parts[0], 4), round(parts[2], 4)]


def step_table(repeats: int, pipeline: Any) -> dict[str, Any]:
    """Where a step of the first row goes after the first, with the cache and without it."""
    draw = torch.Generator().manual_seed(0)
    codes = (torch.randint(0, 2560, (1, 8, 8), generator=draw),)
    table = {}
    for has_cache, key in ((True, "exact_cache"), (False, "full_recompute")):
        with cache(pipeline, has_cache):
            table[key] = step_parts(
                lambda mark: caption(pipeline, codes, callback_on_step_end=mark), repeats
            )
    return table


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="folder of a saved pipeline")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    pipeline = (
        UnifiedImageToTextPipeline.from_pretrained(args.pipeline)
        if args.pipeline
        else random_pipeline(8)
    )
    pipelines = {8: pipeline, 16: random_pipeline(16)}
    for each in pipelines.values():
        each.set_progress_bar_config(disable=True)
        each.transformer.to(getattr(torch, args.dtype))
    rows = measure(args.repeats, pipelines)
    by_name = {row["row"]: row["ratio"] for row in rows}
    report = {
        "ratios": {
            "caption_prefix": by_name["caption_64_tokens"],
            "caption_prefix_256_tokens": by_name["caption_256_tokens"],
            "caption_prefix_8_pictures": by_name["eight_captions_64_tokens"],
            "caption_prefix_256_tokens_8_pictures": by_name["eight_captions_256_tokens"],
            "vqa_shared_image": by_name["eight_questions_64_tokens"],
        },
        "denominator": "the same call in the same process without a cache",
        "rows": rows,
        "step": step_table(args.repeats, pipeline),
        "steps": NUM_STEPS,
        "dtype": args.dtype,
        "pipeline": args.pipeline,
    }
    finish(report, args.json)


if __name__ == "__main__":
    main()
