"""Pictures drawn from held-out captions: alignment, style, distribution, copies."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.evaluation.alignment import alignment_metrics
from multimodal_dlm.evaluation.baselines import pixel_features
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.picture_features import (
    PictureFeatures,
    hits_of_own,
    kernel_distance,
    kernel_distance_error,
    nearest_cosine,
    nearest_difference,
)
from multimodal_dlm.evaluation.probes import LinearProbe
from multimodal_dlm.evaluation.scorer_fitting import is_held_out
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import name_of_sample
from multimodal_dlm.models import efficientnet, minilm
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.pipelines.pixels import from_pixels

NUM_SHOWN = 24


@register_measure(
    "text_to_image",
    "UnifiedTextToImagePipeline",
    ["text_to_image"],
    weights={efficientnet.PACKAGE: None, minilm.PACKAGE: "scorer"},
)
def measure_text_to_image(
    pipeline: UnifiedTextToImagePipeline,
    data: HeldOut,
    *,
    caption: int = 1,
    attributes: Sequence[str] = ("style", "group"),
    num_train: int | None = None,
    scorer: str | None = None,
    num_inference_steps: int | None = None,
) -> Measurement:
    """Draw held-out captions and compare with the real pictures, in EfficientNet-Lite0 features.

    `own_at_1` and `own_at_5`: the real picture of the caption is the nearest, or among the five
    nearest, of all real pictures drawn for (chance 1 / n, 5 / n). `ATTRIBUTE`: a linear probe,
    fitted to training pictures, reads the record's attribute off the drawn picture; `real` is the
    same on the real ones. Rows without the attribute are left out, and so is an attribute that no
    row has or that has one value in training. `kernel_distance` x 1000 to the real pictures, its
    interval 1.96 jackknife errors. `copy_distance_pixels`: root mean square difference, of pictures
    reduced to 16 x 16, to the nearest of all training pictures, and `copy_distance` the cosine
    distance, left out where `num_train` cuts them; `real` is that of the real pictures: far below
    it would be copies. Baseline `nearest_neighbour` shows, for each caption, the training picture
    whose caption shares most words with it, and `decoded` the real picture after the image
    tokenizer has encoded and decoded it. With a `scorer` also `name_at_1`, `name_at_5` and
    `alignment_auc`, see `alignment_metrics`: names of the training split are the candidates. The
    scorer was fitted to most training pictures and names those far better than new ones: it judges
    as `nearest_neighbour` the nearest of those, about one in ten, that it was not fitted to, and
    `real` is no ceiling for a model that memorises.

    Args:
        pipeline: Draws the pictures, with its default settings but for the steps.
        data: Captions and their pictures, at least 3; the dataset needs a training split.
        caption: Which of a record's captions is drawn; the last where there are fewer.
        attributes: Entries of the records' meta.
        num_train: Training pictures that probes are fitted to; None for all.
        scorer: Folder of an image-text scorer that was fitted to the training split by the rule of
            `fit_to_source`, and to none of the pictures of the split, such as `scorers/emoji`; None
            for no such metrics.
        num_inference_steps: Steps of each picture; None for the pipeline's default.

    Raises:
        DataError: When the split, or the training split, is empty.
        ConfigError: When the weights of EfficientNet-Lite0, or of MiniLM for a scorer, are not
            installed.
        CheckpointError: When there is no such scorer.
    """
    samples, reader = data.samples(), data.training()
    prompts = [_caption(sample.record, caption) for sample in samples]
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    drawn = draw_pictures(pipeline, prompts, data, **steps)
    order = KeyedDraws(data.seed, "text_to_image/train").permutation(len(reader))[:num_train]
    train = [reader[int(index)] for index in order]
    records = [reader.record(index) for index in range(len(reader))]
    captions = [_caption(record, caption) for record in records]
    nearest = nearest_by_words(prompts, captions)
    copies = [reader[index].image for index in nearest]
    features = PictureFeatures(batch_size=data.batch_size)
    real = [sample.image for sample in samples]
    pictures = {
        "model": drawn,
        "copied": copies,
        "decoded": decoded_pictures(pipeline, real, data),
        "real": real,
        "train": [sample.image for sample in train],
    }
    vectors = {name: features(some) for name, some in pictures.items()}
    metrics = _alignment(vectors, data.seed)
    if scorer is not None:
        judged = {who: vectors[who] for who in ("model", "decoded", "real")}
        unseen = _nearest_unseen(prompts, records, captions)
        if unseen:
            judged["nearest_neighbour"] = features([reader[index].image for index in unseen])
        names = [name_of_sample(sample) for sample in samples]
        known = {name_of_sample(Sample(record)) for record in records}
        metrics |= alignment_metrics(judged, names, sorted(known), scorer, seed=data.seed)
    for name in attributes:
        found = _attribute(name, train, samples, vectors, data.seed)
        metrics |= {name: found} if found is not None else {}
    metrics["kernel_distance"] = _kernel_metric(vectors)
    metrics |= _copy_distances(pictures, vectors, reader, data.seed)
    images = [Image.fromarray(picture) for picture in drawn[:NUM_SHOWN]]
    return Measurement(metrics, {"drawn": contact_sheet(images, prompts[:NUM_SHOWN], columns=6)})


def to_images(pictures: Sequence[np.ndarray]) -> list[Image.Image]:
    """Arrays of uint8 (height, width, 3) as PIL pictures."""
    return [Image.fromarray(picture) for picture in pictures]


def draw_pictures(
    pipeline: Any, prompts: Sequence[str], data: HeldOut, **options: Any
) -> list[np.ndarray]:
    """One picture a prompt, the same in any batch size, uint8 (height, width, 3)."""
    drawn: list[np.ndarray] = []
    for rows in data.batches(len(prompts)):
        images = pipeline(list(prompts[rows]), generator=data.generators(rows), **options).images
        drawn += [np.asarray(image) for image in images]
    return drawn


@torch.no_grad()
def decoded_pictures(
    pipeline: Any, pictures: Sequence[np.ndarray], data: HeldOut
) -> list[np.ndarray]:
    """Pictures after the image tokenizer has encoded and decoded them, uint8 (height, width, 3)."""
    codes = encode_images(pipeline, pictures, data.batch_size)
    decoded: list[np.ndarray] = []
    for rows in data.batches(len(pictures)):
        part = tuple(level[rows].to(pipeline.device) for level in codes)
        back = pipeline.image_tokenizer.decode(part).cpu()
        decoded += [np.asarray(image) for image in from_pixels(back.clamp(0, 1), "pil")]
    return decoded


def nearest_by_words(prompts: Sequence[str], captions: Sequence[str]) -> list[int]:
    """The caption with the largest share of words in common (Jaccard), the first among equals."""
    bags = [frozenset(caption.lower().split()) for caption in captions]
    found = []
    for prompt in prompts:
        words = frozenset(prompt.lower().split())
        scores = [len(words & bag) / len(words | bag) for bag in bags]
        found.append(int(np.argmax(scores)))
    return found


def _alignment(vectors: Mapping[str, Tensor], seed: int) -> dict[str, Metric]:
    """Whether the real picture of the caption is among the nearest real pictures."""
    metrics = {}
    for count in (1, 5):
        baselines = {
            "nearest_neighbour": hits_of_own(vectors["copied"], vectors["real"], count),
            "decoded": hits_of_own(vectors["decoded"], vectors["real"], count),
            "chance": min(1.0, count / len(vectors["real"])),
        }
        own = hits_of_own(vectors["model"], vectors["real"], count)
        metrics[f"own_at_{count}"] = mean_metric(own, baselines=baselines, seed=seed)
    return metrics


def _nearest_unseen(
    prompts: Sequence[str], records: Sequence[Record], captions: Sequence[str]
) -> list[int]:
    """For each prompt the nearest training picture that no scorer was fitted to; empty without."""
    kept = [index for index, record in enumerate(records) if is_held_out(Sample(record))]
    if not kept:
        return []
    return [kept[place] for place in nearest_by_words(prompts, [captions[i] for i in kept])]


def _attribute(
    name: str,
    train: Sequence[Sample],
    samples: Sequence[Sample],
    vectors: Mapping[str, Tensor],
    seed: int,
) -> Metric | None:
    """Share of drawn pictures off which a probe reads the true attribute.

    Only rows that have the attribute count; None where no row has it, or training has one value.
    """
    known, judged = (
        [row for row, sample in enumerate(some) if sample.record.meta.get(name) is not None]
        for some in (train, samples)
    )
    labels = [str(train[row].record.meta[name]) for row in known]
    truths = [str(samples[row].record.meta[name]) for row in judged]
    if len(set(labels)) < 2 or not truths:
        return None
    probe = LinearProbe(vectors["train"][known], labels)

    def right(who: str) -> list[bool]:
        found = probe.predict(vectors[who][judged])
        return [a == b for a, b in zip(found, truths, strict=True)]

    baselines = {
        "nearest_neighbour": right("copied"),
        "majority": Counter(truths).most_common(1)[0][1] / len(truths),
        "decoded": right("decoded"),
        "real": right("real"),
    }
    return mean_metric(right("model"), baselines=baselines, seed=seed)


def _kernel_metric(vectors: Mapping[str, Tensor]) -> Metric:
    """1000 x distance of the drawn pictures to the real ones, and of what costs nothing."""
    real, count = vectors["real"], len(vectors["real"])
    value = kernel_distance(vectors["model"], real)
    half = 1.96 * kernel_distance_error(vectors["model"], real)
    baselines = {
        "nearest_neighbour": 1000 * kernel_distance(vectors["copied"], real),
        "decoded": 1000 * kernel_distance(vectors["decoded"], real),
        "train": 1000 * kernel_distance(vectors["train"][:count], real),
    }
    return Metric(1000 * value, 1000 * (value - half), 1000 * (value + half), count, baselines)


def _copy_distances(
    pictures: Mapping[str, Sequence[np.ndarray]],
    vectors: Mapping[str, Tensor],
    reader: ShardReader,
    seed: int,
) -> dict[str, Metric]:
    """Distances to the nearest of all training pictures; none by features that only some have."""
    is_whole = len(pictures["train"]) == len(reader)
    every: Iterable[np.ndarray] = pictures["train"]
    if not is_whole:
        every = (sample.image for sample in reader)
    small = {who: torch.from_numpy(pixel_features(pictures[who])) for who in ("model", "real")}
    # One at a time: a whole split may be larger than the memory.
    small["train"] = torch.from_numpy(np.concatenate([pixel_features([one]) for one in every]))
    metrics = {}
    measured: dict[str, tuple[Callable[..., list[float]], Mapping[str, Tensor]]] = {}
    if is_whole:
        measured["copy_distance"] = (nearest_cosine, vectors)
    measured["copy_distance_pixels"] = (nearest_difference, small)
    for name, (distance, rows) in measured.items():
        baselines = {"real": distance(rows["real"], rows["train"])}
        own = distance(rows["model"], rows["train"])
        metrics[name] = mean_metric(own, baselines=baselines, seed=seed)
    return metrics


def _caption(record: Record, place: int) -> str:
    return record.captions[min(place, len(record.captions) - 1)]
