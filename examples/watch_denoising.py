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


def main(pipeline: str, prompt: str, output: Path) -> None:
    """Save a sheet with one picture a step; what is still masked is gray."""
    pipe = UnifiedTextToImagePipeline.from_pretrained(pipeline)
    vocabulary = pipe.transformer.vocabulary
    steps: list[Image.Image] = []

    def record(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        ids = tensors["input_ids"]
        window = ids[:, 1 : 1 + pipe.processor.image_grids[0][0] * pipe.processor.image_grids[0][1]]
        is_masked = vocabulary.is_masked(window)
        first = vocabulary.to_input_ids(torch.zeros_like(window), "image.0")
        codes = vocabulary.to_codes(torch.where(is_masked, first, window), "image.0")
        grid = pipe.processor.image_grids[0]
        pixels = pipe.image_tokenizer.decode((codes.view(-1, *grid),))[0]
        cover = is_masked.view(1, 1, *grid).float()
        cover = torch.nn.functional.interpolate(cover, pixels.shape[-2:])[0]
        shown = torch.where(cover > 0, torch.full_like(pixels, 0.8), pixels)
        array = (shown.permute(1, 2, 0) * 255).byte().numpy()
        steps.append(Image.fromarray(array))
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
