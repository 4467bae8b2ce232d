"""Pictures of held-out prompts by several drawers, judged side by side with bootstrap intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.evaluation.bootstrap import bootstrap_interval
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import mean_metric
from multimodal_dlm.evaluation.picture_features import (
    PictureFeatures,
    hits_of_own,
    kernel_distance,
    kernel_distance_error,
)
from multimodal_dlm.evaluation.probes import LinearProbe
from multimodal_dlm.evaluation.scorer import ImageTextScorer, name_ranks
from multimodal_dlm.evaluation.text_metrics import name_of_sample
from multimodal_dlm.models.minilm import TextEmbedder

CAPTION = 1  # The caption that names concept and artist.
ATTRIBUTES = ("style", "group")
Draw = Callable[..., Any]


@dataclass(frozen=True)
class Drawer:
    """Something that draws pictures from prompts.

    Args:
        draw: (prompts, generator=one a row) -> an output with PIL `images`.
        settings: What it is, as JSON values.
    """

    draw: Draw
    settings: Mapping[str, Any]


def drawn_once(drawer: Drawer, prompts: Sequence[str], data: HeldOut, folder: Path) -> list[Any]:
    """One picture a prompt; every batch is kept in the folder, so that a run can be continued.

    Raises:
        SystemExit: When the folder holds pictures of other prompts, settings, seed or batch size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    what = {
        "settings": dict(drawer.settings),
        "prompts": list(prompts),
        "seed": data.seed,
        "batch_size": data.batch_size,
    }
    note = folder / "what.json"
    if not note.exists():
        note.write_text(json.dumps(what, indent=1) + "\n")
    if json.loads(note.read_text()) != what:
        raise SystemExit(f"`{folder}` holds other pictures. Give another folder, or remove it.")
    pictures: list[Any] = []
    for rows in data.batches(len(prompts)):
        path = folder / f"{rows.start:05d}.npy"
        if not path.is_file():
            images = drawer.draw(list(prompts[rows]), generator=data.generators(rows)).images
            np.save(path, np.stack([np.asarray(image) for image in images]))
        pictures += list(np.load(path))
    return pictures


class Judge:
    """Real pictures, probes and scorer, prepared once.

    Args:
        data: Held-out prompts and their pictures.
        scorer: Folder of the image-text scorer.
        num_train: Training pictures the probes are fitted to; None for all.
    """

    def __init__(self, data: HeldOut, scorer: str, num_train: int | None) -> None:
        samples, reader = data.samples(), data.reader("train")
        self.seed = data.seed
        self.prompts = [_caption(sample.record) for sample in samples]
        self.features = PictureFeatures(batch_size=64)
        self.real = self.features([sample.image for sample in samples])
        order = KeyedDraws(data.seed, "text_to_image/train").permutation(len(reader))[:num_train]
        train = [reader[int(index)] for index in order]
        seen = self.features([sample.image for sample in train])
        self.truths, self.probes = {}, {}
        for name in ATTRIBUTES:
            known, self.truths[name] = (
                [str(sample.record.meta.get(name)) for sample in rows] for rows in (train, samples)
            )
            self.probes[name] = LinearProbe(seen, known)
        names = [name_of_sample(sample) for sample in samples]
        records = [Sample(reader.record(index)) for index in range(len(reader))]
        listed = sorted({*names, *map(name_of_sample, records)})
        self.own = [listed.index(name) for name in names]
        self.scorer, self.texts = ImageTextScorer.load(scorer), TextEmbedder()(listed)

    def rows(self, pictures: Sequence[Any]) -> tuple[dict[str, list[float]], Tensor]:
        """Each metric's number for each picture, and the pictures' features."""
        features = self.features(pictures)
        ranks = name_ranks(self.scorer.score(features, self.texts), self.own)
        found = {f"name_at_{count}": (ranks <= count).float().tolist() for count in (1, 5)}
        found |= {f"own_at_{n}": hits_of_own(features, self.real, n) for n in (1, 5)}
        for name, probe in self.probes.items():
            guessed = probe.predict(features)
            pairs = zip(guessed, self.truths[name], strict=True)
            found[name] = [float(one == other) for one, other in pairs]
        return found, features

    def compare(self, drawn: Mapping[str, Sequence[Any]], reference: str) -> dict[str, Any]:
        """Metrics of every drawer; beside those of the reference, whether they are within them.

        `is_within`: the mean lies in the bootstrap interval of the reference's. `difference`: mean
        over the same prompts of the drawer's number less the reference's, and its interval.
        """
        rows, features = {}, {}
        for name, pictures in drawn.items():
            rows[name], features[name] = self.rows(pictures)
        report: dict[str, Any] = {}
        for name, own in rows.items():
            report[name] = {}
            for metric, values in own.items():
                base = rows[reference][metric]
                low, high = bootstrap_interval(base, seed=self.seed)
                apart = np.subtract(values, base).tolist()
                mean = sum(values) / len(values)
                report[name][metric] = {
                    **mean_metric(values, seed=self.seed).to_dict(),
                    "is_within": bool(low <= mean <= high),
                    "difference": mean_metric(apart, seed=self.seed).to_dict(),
                }
            value, error = (
                1000 * function(features[name], self.real)
                for function in (kernel_distance, kernel_distance_error)
            )
            report[name]["kernel_distance"] = {
                "value": round(value, 5), "low": round(value - 1.96 * error, 5),
                "high": round(value + 1.96 * error, 5), "n": len(self.real),
            }  # fmt: skip
        return report


def _caption(record: Record) -> str:
    return record.captions[min(CAPTION, len(record.captions) - 1)]
