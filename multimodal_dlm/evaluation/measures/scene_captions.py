"""Captions of scenes slot by slot: count, objects, relation, size, place, background."""

from collections.abc import Mapping, Sequence

from PIL import Image

from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.evaluation.baselines import NearestPictures, most_frequent, pixel_features
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.scene_slots import count_slots, slot_f1, slots_of_caption
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

NUM_SHOWN = 18


@register_measure("scene_captions", "UnifiedImageToTextPipeline", ["caption"])
def measure_scene_captions(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
    *,
    num_train: int = 4000,
) -> Measurement:
    """F1 of the slots of each caption, and the share of right values slot by slot.

    `f1` is the mean over pictures; `slot.NAME` is over pictures whose true caption has that slot,
    and a caption without it is wrong. Baselines: `nearest_neighbour`, the caption of the most
    similar training picture (16 x 16 pixels), and for slots `majority`, the slot's most frequent
    value in the training captions.

    Args:
        pipeline: Describes the pictures.
        data: Scenes; the truth is the caption the model was trained to write.
        num_train: Training pictures that the baseline chooses among.

    Raises:
        DataError: When the split is empty.
    """
    samples = data.samples()
    images = [Image.fromarray(sample.image) for sample in samples]
    captions = data.texts(pipeline, images)
    true = [slots_of_caption(trained_caption(data.source, s.record)) for s in samples]
    said = {"model": [slots_of_caption(caption) for caption in captions]}
    reader = data.reader("train")
    if len(reader):
        order = KeyedDraws(data.seed, "scene_captions/train").permutation(len(reader))
        train = [reader[int(index)] for index in order[:num_train]]
        labels = [trained_caption(data.source, sample.record) for sample in train]
        nearest = NearestPictures(pixel_features([sample.image for sample in train]), labels)
        found = nearest.nearest(pixel_features([sample.image for sample in samples]))
        said["nearest_neighbour"] = [slots_of_caption(caption) for caption in found]
    records = (reader.record(index) for index in range(len(reader)))
    usual = count_slots(trained_caption(data.source, record) for record in records)
    scores = {
        who: [slot_f1(own, row) for own, row in zip(slots, true, strict=True)]
        for who, slots in said.items()
    }
    metrics = {"f1": _beside(scores, data.seed)}
    for slot in sorted({name for row in true for name in row}):
        rows = [place for place, row in enumerate(true) if slot in row]
        right = {
            who: [float(slots[place].get(slot) == true[place][slot]) for place in rows]
            for who, slots in said.items()
        }
        if slot in usual:
            most = most_frequent(usual[slot])
            right["majority"] = [float(true[place][slot] == most) for place in rows]
        metrics[f"slot.{slot}"] = _beside(right, data.seed)
    shown = slice(0, NUM_SHOWN)
    sheet = contact_sheet(images[shown], captions[shown], columns=6)
    return Measurement(metrics, {"captions": sheet})


def _beside(rows: Mapping[str, Sequence[float]], seed: int):
    baselines = {who: values for who, values in rows.items() if who != "model"}
    return mean_metric(rows["model"], baselines=baselines, seed=seed)
