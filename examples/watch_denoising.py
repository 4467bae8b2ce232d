"""Draw what the sampler has written after every step, on one sheet.

Run: .venv/bin/python examples/watch_denoising.py "a red apple"
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multimodal_dlm import UnifiedTextToImagePipeline
from multimodal_dlm.evaluation import contact_sheet
from multimodal_dlm.pipelines.drafts import draft_pictures


def main(pipeline: str, prompt: str, output: Path) -> None:
    """Save a sheet with one picture a step; what is still masked is gray."""
    pipe = UnifiedTextToImagePipeline.from_pretrained(pipeline)
    steps: list[Image.Image] = []

    def record(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.extend(draft_pictures(pipe, tensors["input_ids"]))
        return {}

    pipe(prompt, generator=torch.Generator().manual_seed(0), callback_on_step_end=record)
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(steps, [f"step {n + 1}" for n in range(len(steps))], cell=128).save(output)
    print(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="a red apple")
    parser.add_argument("--pipeline", default="pipelines/emoji-small")
    parser.add_argument("--output", type=Path, default=Path("out/watch_denoising.png"))
    arguments = parser.parse_args()
    main(arguments.pipeline, arguments.prompt, arguments.output)
