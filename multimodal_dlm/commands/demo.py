"""The demo: every task on the released pipeline, in a minute on two CPU cores."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.loading import RELEASED_PIPELINE, load, require_folder, seeded
from multimodal_dlm.commands.pictures import box_mask
from multimodal_dlm.commands.reporting import Report, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from PIL import Image

    from multimodal_dlm.datasets.manifest import Manifest
    from multimodal_dlm.datasets.schema import Sample

# Common single objects, all of them concepts of the training split.
PROMPTS = (
    "a red apple", "a banana", "a strawberry", "a pizza", "a fish", "a cat face",
    "a rose", "an evergreen tree", "a red heart", "a star", "a rocket", "a soccer ball",
)  # fmt: skip
HOLE = (0.5, 0.0, 1.0, 1.0)  # The right half.
INPAINT_RESULTS = 3
HELD_OUT_SPLITS = ("unseen_combinations", "test", "val")
PICTURES_PER_SOURCE = 4


@dataclass(frozen=True)
class HeldOut:
    """One held-out picture: what the model says beside the truth."""

    key: str
    source: str
    split: str
    caption: str
    true_caption: str
    question: str | None = None
    answer: str | None = None
    true_answer: str | None = None


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of the command."""
    parser.add_function_arguments(run_demo, as_group=False)


def run_demo(
    *,
    pipeline: str = RELEASED_PIPELINE,
    data: str = "datasets/sample.yaml",
    output: str = "out/demo",
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Draw, inpaint, describe and answer with one model.

    Args:
        pipeline: folder of a saved pipeline, or `owner/name` on the Hub
        data: manifest of the held-out pictures to describe
        output: folder for `prompts.png`, `inpaint.png` and `demo.json`
        seed: of the first picture; picture i has seed + i
        device: auto, cpu, cuda, cuda:1
    """
    start = time.perf_counter()
    require_folder(pipeline)
    from multimodal_dlm.datasets.manifest import open_manifest

    manifest = open_manifest(data)
    loaded = load("UnifiedTextToImagePipeline", pipeline, device)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {"load": time.perf_counter() - start}
    say(f"drawing {len(PROMPTS)} prompts")
    images = _timed(seconds, "prompts", lambda: _draw(loaded, folder, seed))
    say(f"inpainting the right half of the first picture {INPAINT_RESULTS} times")
    _timed(seconds, "inpaint", lambda: _inpaint(loaded, images[0], folder, seed))
    samples = held_out_samples(manifest)
    say(f"describing {len(samples)} held-out pictures")
    rows = _describe(loaded, samples, seconds)
    seconds["total"] = time.perf_counter() - start
    counts = {
        "prompts": len(PROMPTS),
        "inpaint": INPAINT_RESULTS,
        "captions": len(rows),
        "answers": sum(row.question is not None for row in rows),
    }
    values = {
        "pipeline": pipeline,
        "seed": seed,
        "prompts": list(PROMPTS),
        "held_out": [asdict(row) for row in rows],
        **_scores(rows),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "seconds_each": {
            name: round(seconds[name] / count, 3) for name, count in counts.items() if count
        },
        "files": [str(folder / name) for name in ("prompts.png", "inpaint.png", "demo.json")],
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "demo.json").write_text(text + "\n", encoding="utf-8")
    return Report(values, _summary(rows, values))


def held_out_samples(manifest: "Manifest") -> "list[tuple[str, str, Sample]]":
    """The first pictures of a held-out split of every source: (source, split, sample)."""
    from itertools import islice

    from multimodal_dlm.datasets.reading import iterate_samples

    found = []
    for source in manifest.sources.values():
        split = next((name for name in HELD_OUT_SPLITS if source.count(name)), None)
        if split is not None:
            pictures = (s for s in iterate_samples(source, split) if s.image_bytes is not None)
            first = islice(pictures, PICTURES_PER_SOURCE)
            found += [(source.name, split, sample) for sample in first]
    return found


def _draw(pipeline: Any, folder: Path, seed: int) -> "list[Image.Image]":
    from multimodal_dlm.evaluation.sheets import contact_sheet

    images = pipeline(list(PROMPTS), generator=seeded(seed, len(PROMPTS))).images
    contact_sheet(images, PROMPTS).save(folder / "prompts.png")
    return images


def _inpaint(pipeline: Any, picture: "Image.Image", folder: Path, seed: int) -> "list[Image.Image]":
    from PIL import Image

    from multimodal_dlm.evaluation.sheets import contact_sheet
    from multimodal_dlm.pipelines import UnifiedInpaintPipeline

    inpaint: Any = UnifiedInpaintPipeline.from_pipe(pipeline)
    inpaint.set_progress_bar_config(disable=True)
    mask = box_mask(picture.size, HOLE)
    results = inpaint(
        PROMPTS[0],
        picture,
        mask,
        num_images_per_prompt=INPAINT_RESULTS,
        generator=seeded(seed, INPAINT_RESULTS),
    ).images
    hole = Image.composite(Image.new("RGB", picture.size, (128, 128, 128)), picture, mask)
    captions = ["original", "hole", *(f"result {n + 1}" for n in range(INPAINT_RESULTS))]
    contact_sheet([picture, hole, *results], captions, columns=5).save(folder / "inpaint.png")
    return results


def _scores(rows: list[HeldOut]) -> dict[str, int]:
    """How many captions name the picture, and how many answers are right."""
    from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption

    named = [exact_match(name_of_caption(r.caption), name_of_caption(r.true_caption)) for r in rows]
    right = [exact_match(row.answer or "", row.true_answer or "") for row in rows if row.question]
    return {"captions_with_the_true_name": sum(named), "answers_right": sum(right)}


def _describe(
    pipeline: Any, samples: "list[tuple[str, str, Sample]]", seconds: dict[str, float]
) -> list[HeldOut]:
    from PIL import Image

    from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

    if not samples:
        return []
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)
    pictures = [Image.fromarray(sample.image) for _, _, sample in samples]
    captions = _timed(seconds, "captions", lambda: read(pictures).texts)
    # A different question of each picture, so that several kinds are shown.
    pairs = [
        sample.record.qa[place % len(sample.record.qa)] if sample.record.qa else None
        for place, (_, _, sample) in enumerate(samples)
    ]
    asked = [place for place, pair in enumerate(pairs) if pair is not None]
    questions = [pair.question for pair in pairs if pair is not None]
    shown = [pictures[place] for place in asked]
    texts: list[str] = []
    if asked:
        texts = _timed(seconds, "answers", lambda: read(shown, questions).texts)
    answers = dict(zip(asked, texts, strict=True))
    rows = []
    for place, (source, split, sample) in enumerate(samples):
        pair = pairs[place]
        rows.append(
            HeldOut(
                key=sample.key,
                source=source,
                split=split,
                caption=captions[place],
                true_caption=sample.record.captions[0],
                question=pair.question if pair else None,
                answer=answers.get(place),
                true_answer=pair.answer if pair else None,
            )
        )
    return rows


def _timed(seconds: dict[str, float], name: str, task: Any) -> Any:
    start = time.perf_counter()
    result = task()
    seconds[name] = time.perf_counter() - start
    return result


def _summary(rows: list[HeldOut], values: dict[str, Any]) -> str:
    lines = [f"drew {len(PROMPTS)} prompts: {', '.join(PROMPTS)}", ""]
    if rows:
        lines.append("held-out pictures, model beside truth:")
    for row in rows:
        lines.append(f"  {row.key}")
        lines.append(f"    caption: {row.caption}  |  truth: {row.true_caption}")
        if row.question is not None:
            lines.append(f"    {row.question} {row.answer}  |  truth: {row.true_answer}")
    asked = sum(row.question is not None for row in rows)
    if rows:
        names = values["captions_with_the_true_name"]
        answers = values["answers_right"]
        lines += ["", f"right: {names} of {len(rows)} names, {answers} of {asked} answers"]
    total = ", ".join(f"{name} {value:.1f} s" for name, value in values["seconds"].items())
    each = ", ".join(f"{name} {value:.2f} s" for name, value in values["seconds_each"].items())
    return "\n".join([*lines, "", f"seconds: {total}", f"each: {each}", *values["files"]])
