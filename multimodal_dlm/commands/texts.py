"""Commands that read pictures: caption, ask, rank."""

import time
from typing import TYPE_CHECKING

from multimodal_dlm.commands.loading import (
    RELEASED_PIPELINE,
    given,
    load,
    read_picture,
    seeded,
)
from multimodal_dlm.commands.reporting import Report

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of one command."""
    if name == "caption":
        parser.add_argument("image", nargs="+", type=str, help="picture files")
        parser.add_function_arguments(run_caption, skip={"image"}, as_group=False)
    elif name == "rank":
        parser.add_argument("image", type=str, help="picture file")
        parser.add_argument("text", nargs="+", type=str, help="captions; quote each one")
        parser.add_function_arguments(run_rank, skip={"image", "text"}, as_group=False)
    else:
        parser.add_argument("image", type=str, help="picture file")
        parser.add_argument("question", nargs="+", type=str, help="questions; quote each one")
        parser.add_function_arguments(run_ask, skip={"image", "question"}, as_group=False)


def run_caption(
    image: list[str],
    *,
    pipeline: str = RELEASED_PIPELINE,
    num_texts_per_image: int = 1,
    gen_length: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Describe pictures.

    Args:
        image: Picture files.
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        num_texts_per_image: captions of each picture
        gen_length: tokens of the caption at most; null takes the pipeline's default
        num_inference_steps: denoising steps; null is one per token
        guidance_scale: strength of the picture, 1 is off; null takes the pipeline's default
        seed: of the first caption; caption i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    pictures = [read_picture(path) for path in image]
    loaded = load("UnifiedImageToTextPipeline", pipeline, device)
    start = time.perf_counter()
    texts = loaded(
        pictures,
        num_texts_per_image=num_texts_per_image,
        generator=seeded(seed, len(pictures) * num_texts_per_image),
        **given(
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ),
    ).texts
    seconds = time.perf_counter() - start
    paths = [path for path in image for _ in range(num_texts_per_image)]
    rows = [{"image": path, "caption": text} for path, text in zip(paths, texts, strict=True)]
    lines = [f"{row['image']}: {row['caption']}" for row in rows]
    return Report({"captions": rows, "seconds": round(seconds, 3)}, "\n".join(lines))


def run_ask(
    image: str,
    question: list[str],
    *,
    pipeline: str = RELEASED_PIPELINE,
    gen_length: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Answer questions about a picture.

    Args:
        image: Picture file.
        question: Questions.
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        gen_length: tokens of the answer at most; null takes the pipeline's default
        num_inference_steps: denoising steps; null is one per token
        guidance_scale: strength of the picture, 1 is off; null takes the pipeline's default
        seed: of the first answer; answer i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    picture = read_picture(image)
    loaded = load("UnifiedImageToTextPipeline", pipeline, device)
    start = time.perf_counter()
    texts = loaded(
        [picture] * len(question),
        question,
        generator=seeded(seed, len(question)),
        **given(
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ),
    ).texts
    seconds = time.perf_counter() - start
    rows = [{"question": q, "answer": a} for q, a in zip(question, texts, strict=True)]
    lines = [f"{row['question']} {row['answer']}" for row in rows]
    values = {"image": image, "answers": rows, "seconds": round(seconds, 3)}
    return Report(values, "\n".join(lines))


def run_rank(
    image: str,
    text: list[str],
    *,
    pipeline: str = RELEASED_PIPELINE,
    num_draws: int = 16,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Sort captions by how much likelier a picture makes them, in nats, the best first.

    Args:
        image: Picture file.
        text: Captions, worded as the model's own captions are.
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        num_draws: masks of each text, with and without the picture; even
        seed: of the masks, the same for all texts
        device: auto, cpu, cuda, cuda:1
    """
    picture = read_picture(image)
    loaded = load("UnifiedImageToTextPipeline", pipeline, device)
    start = time.perf_counter()
    ranked = loaded.rank_texts(picture, text, num_draws=num_draws, generator=seeded(seed, 1)[0])
    seconds = time.perf_counter() - start
    rows = [{"text": row.text, "nats": round(row.score, 3), "place": row.place} for row in ranked]
    lines = [f"{row['nats']:+9.2f} nats  {row['text']}" for row in rows]
    return Report({"image": image, "texts": rows, "seconds": round(seconds, 3)}, "\n".join(lines))
