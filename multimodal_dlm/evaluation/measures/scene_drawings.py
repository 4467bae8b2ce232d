"""Drawn scenes slot by slot: that many things, in that order, at that place, on that color?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.evaluation.baselines import most_frequent
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.measures.text_to_image import draw_pictures, nearest_by_words
from multimodal_dlm.evaluation.picture_features import PictureFeatures
from multimodal_dlm.evaluation.scene_slots import (
    COUNTS,
    Blob,
    background_of,
    count_slots,
    find_blobs,
    slots_of_caption,
)
from multimodal_dlm.evaluation.scorer import ImageTextScorer
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import name_of_caption
from multimodal_dlm.models import efficientnet, minilm
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline

NUM_SHOWN = 18
NUM_COLORED = 400  # Training pictures that say what the colors look like.
_COLUMNS, _ROWS = ("left", "", "right"), ("top", "", "bottom")


@register_measure(
    "scene_drawings",
    "UnifiedTextToImagePipeline",
    ["text_to_image"],
    weights={efficientnet.PACKAGE: "scorer", minilm.PACKAGE: "scorer"},
)
def measure_scene_drawings(
    pipeline: UnifiedTextToImagePipeline,
    data: HeldOut,
    *,
    scorer: str | None = None,
) -> Measurement:
    """Share of drawn scenes that keep to each slot of their caption, found in the pixels.

    Things are what stands out from the color of the rim. `count`: as many things as said;
    `place`: the largest thing lies in that ninth of the picture; `background`: the rim's color is
    nearest to the training pictures' mean color of that name; `relation` (with a `scorer`): of the
    two largest things, the one that looks more like the first object lies left of, or above, the
    other. Baselines: `real` pictures of the same captions, the ceiling of this way to look; the
    `nearest_neighbour`, the training picture whose caption shares most words; `chance`, one of the
    values that training captions give the slot, each as likely (0.5 for the `relation` of two
    things that are there); and `majority`, the most frequent of these values, whatever is asked.

    Args:
        pipeline: Draws the scenes with its default settings.
        data: Scenes; the dataset needs a training split.
        scorer: Folder of an image-text scorer, such as `scorers/emoji`; None leaves out `relation`.

    Raises:
        DataError: When the split, or the training split, is empty.
    """
    samples, reader = data.samples(), data.training()
    prompts = [trained_caption(data.source, sample.record) for sample in samples]
    slots = [slots_of_caption(prompt) for prompt in prompts]
    drawn = draw_pictures(pipeline, prompts, data)
    records = [reader.record(index) for index in range(len(reader))]
    captions = [trained_caption(data.source, record) for record in records]
    copies = [reader[index].image for index in nearest_by_words(prompts, captions)]
    pictures = {
        "model": drawn,
        "real": [sample.image for sample in samples],
        "nearest_neighbour": copies,
    }
    colors = _mean_colors([reader[index] for index in range(min(len(reader), NUM_COLORED))])
    judge = _Judge(scorer) if scorer is not None else None
    found = {who: _judged(some, slots, colors, judge) for who, some in pictures.items()}
    usual = count_slots(captions)
    metrics = {}
    for slot in sorted({name for row in found["model"] for name in row}):
        rows = [place for place, row in enumerate(found["model"]) if slot in row]
        values = {who: [float(some[place][slot]) for place in rows] for who, some in found.items()}
        baselines: dict[str, Sequence[float] | float] = {**values}
        del baselines["model"]
        if slot == "relation":
            baselines["chance"] = 0.5
        elif slot in usual:
            baselines["chance"] = 1 / len(usual[slot])
            most = most_frequent(usual[slot])
            baselines["majority"] = [float(slots[place][slot] == most) for place in rows]
        metrics[slot] = mean_metric(values["model"], baselines=baselines, seed=data.seed)
    images = [Image.fromarray(picture) for picture in drawn[:NUM_SHOWN]]
    return Measurement(metrics, {"drawn": contact_sheet(images, prompts[:NUM_SHOWN], columns=6)})


class _Judge:
    """Tells which of two things looks more like which of two names."""

    def __init__(self, folder: str) -> None:
        self.scorer = ImageTextScorer.load(folder)
        self.features, self.embed = PictureFeatures(), minilm.TextEmbedder()

    def is_first(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> bool:
        """Whether the first crop is the first name, by the better of both assignments."""
        scores = self.scorer.score(self.features(crops), self.embed(list(names)))
        return float(scores[0, 0] + scores[1, 1]) > float(scores[0, 1] + scores[1, 0])


def _judged(
    pictures: Sequence[np.ndarray],
    slots: Sequence[dict[str, str]],
    colors: dict[str, np.ndarray],
    judge: _Judge | None,
) -> list[dict[str, bool]]:
    """Slot -> whether it is kept, for each picture."""
    rows = []
    for picture, said in zip(pictures, slots, strict=True):
        blobs = find_blobs(picture)
        row: dict[str, bool] = {}
        if said.get("background") in colors:
            rim = background_of(picture)
            nearest = min(colors, key=lambda name: float(np.abs(colors[name] - rim).sum()))
            row["background"] = nearest == said["background"]
        if "count" in said:
            row["count"] = len(blobs) == COUNTS[said["count"]]
        if "place" in said:
            row["place"] = bool(blobs) and place_of(blobs[0], picture) == said["place"]
        if "relation" in said and judge is not None:
            row["relation"] = len(blobs) >= 2 and _keeps_order(picture, blobs[:2], said, judge)
        rows.append(row)
    return rows


def place_of(blob: Blob, picture: np.ndarray) -> str:
    """The ninth of the picture that the middle of a thing lies in: `top left`, `centre`, ..."""
    height, width = picture.shape[:2]
    column = _COLUMNS[min(int(3 * blob.x / width), 2)]
    row = _ROWS[min(int(3 * blob.y / height), 2)]
    return f"{row} {column}".strip() or "centre"


def _keeps_order(
    picture: np.ndarray, blobs: Sequence[Blob], said: dict[str, str], judge: _Judge
) -> bool:
    by_place = sorted(blobs, key=lambda blob: blob.x if said["relation"] == "left of" else blob.y)
    crops = [_crop(picture, blob) for blob in by_place]
    return judge.is_first(crops, [name_of_caption(said["first"]), name_of_caption(said["second"])])


def _crop(picture: np.ndarray, blob: Blob) -> np.ndarray:
    """A thing alone, in a square with its background, 64 x 64 pixels."""
    left, top, right, bottom = blob.box
    side = max(right - left, bottom - top) + 4
    paper = Image.new("RGB", (side, side), tuple(int(v) for v in background_of(picture)))
    thing = Image.fromarray(picture[top:bottom, left:right])
    paper.paste(thing, ((side - thing.width) // 2, (side - thing.height) // 2))
    return np.asarray(paper.resize((64, 64), Image.Resampling.BICUBIC))


def _mean_colors(samples: Sequence[Sample]) -> dict[str, Any]:
    """Name of a background -> mean color of the rims of pictures with it."""
    rims: dict[str, list[np.ndarray]] = {}
    for sample in samples:
        rims.setdefault(str(sample.record.meta.get("background")), []).append(
            background_of(sample.image)
        )
    return {name: np.mean(values, axis=0) for name, values in rims.items()}
