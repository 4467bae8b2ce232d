"""Samples during training: a sheet of drawn pictures and captions of held-out ones.

`SampleCallback` is one of the callables that the command line hands to the trainer; the trainer
knows nothing of pipelines.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.datasets.reading import iterate_samples
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextToImagePipeline
from multimodal_dlm.schedulers import ConfidenceScheduler

LOGGER = logging.getLogger(__name__)
PROMPTS = (
    "a red apple", "a dog", "a cat face", "a rocket", "a house", "a yellow star", "a pizza",
    "a car", "two red apples", "a fish to the left of a tree", "a blue circle on a pale background",
    "an emoji of a rose",
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """A held-out picture with its texts."""

    image: Image.Image
    caption: str
    question: str | None
    answer: str | None


def held_out_pictures(manifest: Manifest, *, per_source: int = 4) -> list[HeldOut]:
    """The first pictures of a held-out split of every source that has one."""
    found = []
    for source in manifest.sources.values():
        split = next((name for name in ("val", "test") if source.count(name)), None)
        if split is None:
            continue
        for sample in islice(iterate_samples(source, split), per_source):
            pair = sample.record.qa[0] if sample.record.qa else None
            found.append(
                HeldOut(
                    Image.fromarray(sample.image),
                    sample.record.captions[0],
                    pair.question if pair else None,
                    pair.answer if pair else None,
                )
            )
    return found


class SampleCallback:
    """Writes `samples/step_XXXXXXX.png` and `captions.json` into the run's folder.

    Args:
        run_dir: Folder of the run.
        held_out: Pictures to describe.
        prompts: What to draw.
        seed: Of the drawings, the same at every step so that sheets can be compared.
        guidance_scale: Of the drawings.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        held_out: Sequence[HeldOut] = (),
        prompts: Sequence[str] = PROMPTS,
        seed: int = 0,
        guidance_scale: float = 3.0,
    ) -> None:
        self.folder = Path(run_dir) / "samples"
        self.held_out = list(held_out)
        self.prompts = list(prompts)
        self.seed = seed
        self.guidance_scale = guidance_scale

    def __call__(
        self, step: int, *, transformer: Any, tokenizer: Any, image_tokenizer: Any
    ) -> dict[str, float]:
        """Draw and describe with the weights of this step.

        Args:
            step: Optimizer steps done.
            transformer: Backbone, or its EMA.
            tokenizer: Text tokenizer.
            image_tokenizer: Image tokenizer.

        Returns:
            Scalars for the tracker: the share of questions answered right.
        """
        was_training = transformer.training
        transformer.eval()
        try:
            pipe = UnifiedTextToImagePipeline(
                transformer=transformer,
                scheduler=ConfidenceScheduler(),
                tokenizer=tokenizer,
                image_tokenizer=image_tokenizer,
            )
            pipe.set_progress_bar_config(disable=True)
            self._draw(pipe, step)
            return self._describe(UnifiedImageToTextPipeline.from_pipe(pipe), step)
        finally:
            transformer.train(was_training)

    def _draw(self, pipe: UnifiedTextToImagePipeline, step: int) -> None:
        generators = [
            torch.Generator().manual_seed(self.seed + place) for place in range(len(self.prompts))
        ]
        images = pipe(self.prompts, guidance_scale=self.guidance_scale, generator=generators).images
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:07d}.png"
        contact_sheet(images, self.prompts).save(path)
        LOGGER.info("wrote %s", path)

    def _describe(self, pipe: UnifiedImageToTextPipeline, step: int) -> dict[str, float]:
        if not self.held_out:
            return {}
        pipe.set_progress_bar_config(disable=True)
        rows: list[dict[str, Any]] = []
        captions = pipe([each.image for each in self.held_out]).texts
        asked = [each for each in self.held_out if each.question is not None]
        answers = pipe([each.image for each in asked], [each.question for each in asked]).texts
        for each, caption in zip(self.held_out, captions, strict=True):
            rows.append({"caption": caption, "truth": each.caption})
        questions = [
            {"question": each.question, "answer": answer, "truth": each.answer}
            for each, answer in zip(asked, answers, strict=True)
        ]
        right = sum(row["answer"] == row["truth"] for row in questions)
        path = self.folder / "captions.json"
        history = json.loads(path.read_text()) if path.is_file() else {}
        history[f"{step:07d}"] = {"captions": rows, "questions": questions}
        path.write_text(json.dumps(history, indent=1, ensure_ascii=False))
        return {"samples/answers_right": right / max(len(questions), 1)}
