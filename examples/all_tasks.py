"""One set of weights, every task.

Run: .venv/bin/python examples/all_tasks.py
"""

import argparse

import torch
from PIL import Image

from multimodal_dlm import (
    UnifiedImageToTextPipeline,
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedTextToImagePipeline,
)


def main(pipeline: str) -> None:
    """Draw, describe, ask, inpaint, invent."""
    draw = UnifiedTextToImagePipeline.from_pretrained(pipeline)
    seed = torch.Generator().manual_seed
    apple = draw("a red apple", generator=seed(0)).images[0]

    # The other tasks share the same four components: nothing is loaded twice.
    read = UnifiedImageToTextPipeline.from_pipe(draw)
    print("caption:", read(apple).texts[0])
    print("what is this?", read(apple, "what is this?").texts[0])

    mask = Image.new("L", apple.size, 0)
    mask.paste(255, (32, 0, 64, 64))
    inpaint = UnifiedInpaintPipeline.from_pipe(draw)
    inpaint("a red apple", apple, mask, generator=seed(1)).images[0]
    print("inpainted the right half in", inpaint.num_forwards, "forwards")

    joint = UnifiedJointPipeline.from_pipe(draw)
    print("invented:", joint(num_samples=1, generator=seed(2)).texts[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="pipelines/emoji-small")
    main(parser.parse_args().pipeline)
