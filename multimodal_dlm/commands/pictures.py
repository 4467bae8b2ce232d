"""Commands that draw: generate, inpaint, joint."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.loading import (
    RELEASED_PIPELINE,
    given,
    load,
    read_picture,
    seeded,
)
from multimodal_dlm.commands.reporting import Report
from multimodal_dlm.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from PIL import Image


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of one command."""
    functions: dict[str, Callable[..., Report]] = {
        "generate": run_generate,
        "inpaint": run_inpaint,
        "joint": run_joint,
    }
    skip: set[str | int] = set()
    if name == "generate":
        parser.add_argument("prompt", nargs="+", type=str, help="what to draw; quote each prompt")
        skip = {"prompt"}
    if name == "inpaint":
        parser.add_argument("image", type=str, help="picture file")
        parser.add_argument("prompt", type=str, help="what the whole picture shows")
        skip = {"image", "prompt"}
    parser.add_function_arguments(functions[name], skip=skip, as_group=False)


def run_generate(
    prompt: list[str],
    *,
    pipeline: str = RELEASED_PIPELINE,
    output: str = "out/generate",
    num_images_per_prompt: int = 1,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Draw pictures from prompts.

    Args:
        prompt: What to draw.
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        output: folder for the pictures and `sheet.png`
        num_images_per_prompt: pictures of each prompt
        negative_prompt: what to move away from
        num_inference_steps: denoising steps; null takes the pipeline's default
        guidance_scale: strength of the prompt, 1 is off; null takes the pipeline's default
        seed: of the first picture; picture i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    loaded = load("UnifiedTextToImagePipeline", pipeline, device)
    captions = [text for text in prompt for _ in range(num_images_per_prompt)]
    start = time.perf_counter()
    images = loaded(
        prompt,
        num_images_per_prompt=num_images_per_prompt,
        generator=seeded(seed, len(captions)),
        **given(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ),
    ).images
    seconds = time.perf_counter() - start
    return _save(images, captions, output, seed, seconds)


def run_inpaint(
    image: str,
    prompt: str,
    *,
    mask: str | None = None,
    box: list[float] | None = None,
    pipeline: str = RELEASED_PIPELINE,
    output: str = "out/inpaint",
    num_images: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Redraw a part of a picture.

    Args:
        image: Picture file.
        prompt: What the whole picture shows.
        mask: picture file, white where to redraw
        box: in place of a mask, the hole as shares of the picture: "[left, top, right, bottom]"
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        output: folder for the pictures and `sheet.png`
        num_images: results, each with its own seed
        num_inference_steps: denoising steps; null takes the pipeline's default
        guidance_scale: strength of the prompt, 1 is off; null takes the pipeline's default
        seed: of the first result; result i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    if (mask is None) == (box is None):
        raise ConfigError(
            "One of `mask` and `box` must be given; got"
            f" {'neither' if mask is None else 'both'}. Use --box '[0.5, 0, 1, 1]' for the right"
            " half."
        )
    picture = read_picture(image).convert("RGB")
    hole = read_picture(mask) if mask is not None else box_mask(picture.size, box or [])
    loaded = load("UnifiedInpaintPipeline", pipeline, device)
    start = time.perf_counter()
    images = loaded(
        prompt,
        picture,
        hole,
        num_images_per_prompt=num_images,
        generator=seeded(seed, num_images),
        **given(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
    ).images
    seconds = time.perf_counter() - start
    return _save(images, [prompt] * num_images, output, seed, seconds, before=picture)


def run_joint(
    *,
    num_samples: int = 4,
    pipeline: str = RELEASED_PIPELINE,
    output: str = "out/joint",
    num_inference_steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Invent pictures together with their captions.

    Args:
        num_samples: pairs of picture and caption
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        output: folder for the pictures and `sheet.png`
        num_inference_steps: denoising steps; null takes the pipeline's default
        seed: of the first pair; pair i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    loaded = load("UnifiedJointPipeline", pipeline, device)
    start = time.perf_counter()
    result = loaded(
        num_samples=num_samples,
        generator=seeded(seed, num_samples),
        **given(num_inference_steps=num_inference_steps),
    )
    seconds = time.perf_counter() - start
    return _save(result.images, result.texts, output, seed, seconds)


def box_mask(size: tuple[int, int], box: Sequence[float]) -> "Image.Image":
    """A mask picture, white inside the box.

    Args:
        size: Width and height in pixels.
        box: Left, top, right, bottom as shares of the picture.

    Raises:
        ConfigError: When the box is not inside the picture or holds no pixel of it.
    """
    from PIL import Image, ImageDraw

    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ConfigError(
            "`box` must be left, top, right, bottom with 0 <= left < right <= 1 and 0 <= top <"
            f" bottom <= 1; got {list(box)}. Use --box '[0.25, 0.25, 0.75, 0.75]' for the middle."
        )
    left, top, right, bottom = (round(share * size[place % 2]) for place, share in enumerate(box))
    if left == right or top == bottom:
        raise ConfigError(
            f"`box` must hold at least one pixel of the {size[0]} x {size[1]} picture; got"
            f" {list(box)}. Give a larger one."
        )
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def _save(
    images: Sequence["Image.Image"],
    captions: Sequence[str],
    output: str,
    seed: int,
    seconds: float,
    before: "Image.Image | None" = None,
) -> Report:
    """Save the pictures with their recipes and a contact sheet."""
    from multimodal_dlm.evaluation.sheets import contact_sheet
    from multimodal_dlm.pipelines.image_metadata import save_image

    folder = Path(output)
    rows: list[dict[str, Any]] = []
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        path = save_image(image, folder / f"{place:03d}-{file_stem(caption)}.png")
        rows.append({"path": str(path), "text": caption, "seed": seed + place})
    first = [] if before is None else [(before.resize(images[0].size), "given")]
    shown = [*first, *zip(images, captions, strict=True)]
    sheet = folder / "sheet.png"
    contact_sheet([image for image, _ in shown], [text for _, text in shown]).save(sheet)
    lines = [f"{row['path']}  {row['text']}" for row in rows]
    lines += [str(sheet), f"{len(rows)} pictures in {seconds:.1f} s"]
    values = {"pictures": rows, "sheet": str(sheet), "seconds": round(seconds, 3)}
    return Report(values, "\n".join(lines))


def file_stem(text: str) -> str:
    """Letters and digits of a text, joined by hyphens, at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "picture"
