"""Captions and answers with and without the exact cache: seconds, ratios, identity of the ids.

Rows: one caption at 16 steps with 64 and 256 image tokens, and eight questions about one picture.
The picture and the question are the prefix, computed once a call with the cache and at every step
without it. Settings are interleaved in one process; each figure is the median. Without
`--pipeline` the backbone of the released size has random weights, which take as long; 256 tokens
always have random weights. Codes are given, so the image tokenizer takes no part.

    OMP_NUM_THREADS=2 python benchmarks/image_to_text.py --json out/image_to_text.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from reporting import finish

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


def caption(pipeline: Any, codes: Any) -> Any:
    """One caption; returns its ids."""
    return pipeline(codes=codes, gen_length=CAPTION_LENGTH, num_inference_steps=NUM_STEPS).sequences


def answers(pipeline: Any, codes: Any) -> Any:
    """Eight answers about one picture in one call; returns their ids."""
    rows = tuple(level.repeat(len(QUESTIONS), 1, 1) for level in codes)
    return pipeline(codes=rows, question=QUESTIONS, num_inference_steps=NUM_STEPS).sequences


def measure(repeats: int, pipeline: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Median seconds of every row, cached and not; the first round is warm-up."""
    pipelines = {8: pipeline, 16: random_pipeline(16)}
    rows = {
        "caption_64_tokens": (8, caption),
        "caption_256_tokens": (16, caption),
        "eight_questions_64_tokens": (8, answers),
    }
    draw = torch.Generator().manual_seed(0)
    codes = {side: (torch.randint(0, 2560, (1, side, side), generator=draw),) for side in pipelines}
    seconds: dict[tuple[str, bool], list[float]] = {}
    ids: dict[tuple[str, bool], Any] = {}
    for each in pipelines.values():
        each.set_progress_bar_config(disable=True)
        each.transformer.to(dtype)
    for round_number in range(repeats + 1):
        for name, (side, run) in rows.items():
            for has_cache in (False, True):
                transformer = pipelines[side].transformer
                if has_cache:
                    transformer.enable_cache(ExactCacheConfig())
                start = time.perf_counter()
                ids[name, has_cache] = run(pipelines[side], codes[side])
                taken = time.perf_counter() - start
                transformer.disable_cache()
                if round_number:
                    seconds.setdefault((name, has_cache), []).append(taken)
    return [
        {
            "row": name,
            "seconds_full_recompute": round(statistics.median(seconds[name, False]), 4),
            "seconds_exact_cache": round(statistics.median(seconds[name, True]), 4),
            "ratio": round(
                statistics.median(seconds[name, False]) / statistics.median(seconds[name, True]), 3
            ),
            "identical_ids": bool(torch.equal(ids[name, False], ids[name, True])),
        }
        for name in rows
    ]


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
    rows = measure(args.repeats, pipeline, getattr(torch, args.dtype))
    by_name = {row["row"]: row["ratio"] for row in rows}
    report = {
        "ratios": {
            "caption_prefix": by_name["caption_64_tokens"],
            "caption_prefix_256_tokens": by_name["caption_256_tokens"],
            "vqa_shared_image": by_name["eight_questions_64_tokens"],
        },
        "denominator": "the same call in the same process without a cache",
        "rows": rows,
        "steps": NUM_STEPS,
        "dtype": args.dtype,
        "pipeline": args.pipeline,
    }
    finish(report, args.json)


if __name__ == "__main__":
    main()
