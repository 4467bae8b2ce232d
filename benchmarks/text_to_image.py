"""Seconds a picture of the text-to-image pipeline at its default steps, alone and in a batch.

Settings (dtype x exact cache x batch) are interleaved in one process; each report is the median.
Without `--pipeline` the backbone has the released size and random weights, which take as long.

    OMP_NUM_THREADS=2 python benchmarks/text_to_image.py --json out/text_to_image.json
"""

import argparse
import itertools
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
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import load_text_tokenizer
from multimodal_dlm.training.components import build_vocabulary

ROOT = Path(__file__).parents[1]
PROMPT = "a noto emoji of a red apple"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_pipeline() -> UnifiedTextToImagePipeline:
    """The released tokenizers and a small backbone that has learned nothing."""
    text = load_text_tokenizer(ROOT / "tokenizers" / "text")
    image: Any = ImageTokenizer.from_pretrained(ROOT / "tokenizers" / "image", dtype=torch.float32)
    torch.manual_seed(0)
    transformer = UnifiedTransformerModel(
        vocabulary=build_vocabulary(text, image).to_dict(),
        layout=make_layout(max_text=40, num_image_tokens=64),
        **get_preset("small"),
    )
    return UnifiedTextToImagePipeline(
        transformer=transformer.eval(),
        scheduler=ConfidenceScheduler(),
        tokenizer=text,
        image_tokenizer=image.eval(),
    )


def measure(pipeline: Any, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Median seconds a picture of every setting; the first round is warm-up."""
    pipeline.set_progress_bar_config(disable=True)
    settings = list(itertools.product(DTYPES, (False, True), batches))
    seconds: dict[tuple[str, bool, int], list[float]] = {setting: [] for setting in settings}
    for round_number in range(repeats + 1):
        for dtype, has_cache, batch in settings:
            pipeline.transformer.to(DTYPES[dtype])
            pipeline.transformer.disable_cache()
            if has_cache:
                pipeline.transformer.enable_cache(ExactCacheConfig())
            start = time.perf_counter()
            pipeline([PROMPT] * batch, generator=torch.Generator().manual_seed(0))
            if round_number:
                seconds[dtype, has_cache, batch].append((time.perf_counter() - start) / batch)
    return [
        {
            "dtype": dtype,
            "exact_cache": has_cache,
            "batch": batch,
            "seconds_per_picture": round(statistics.median(values), 4),
            "all": [round(value, 4) for value in values],
        }
        for (dtype, has_cache, batch), values in seconds.items()
    ]


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="folder of a saved pipeline")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    if args.pipeline:
        pipeline = UnifiedTextToImagePipeline.from_pretrained(args.pipeline)
    else:
        pipeline = random_pipeline()
    rows = measure(pipeline, args.batches, args.repeats)
    report = {
        "settings": rows,
        "num_forwards": pipeline.num_forwards,
        "pipeline": args.pipeline,
    }
    finish(report, args.json)


if __name__ == "__main__":
    main()
