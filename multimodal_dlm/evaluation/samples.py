"""Samples during training: sheets of pictures, and captions of held-out ones.

The callables here are handed by the command line to the trainer, which knows nothing of pipelines.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import nn

from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.datasets.reading import iterate_samples
from multimodal_dlm.evaluation.sheets import contact_sheet, grid_sheet
from multimodal_dlm.evaluation.text_metrics import exact_match
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextToImagePipeline
from multimodal_dlm.tokenizers.image import ImageTokenizer

logger = logging.getLogger(__name__)

PROMPTS = (
    "a red apple", "a cat face", "a rocket", "a pizza", "an evergreen tree", "a red heart",
    "a soccer ball", "a twemoji emoji of a rose", "two red apples",
    "a fish to the left of a banana", "a star above a rocket", "a blue circle on a pale background",
)  # fmt: skip
HELD_OUT_SPLITS = ("val", "test")
FOLDER = "samples"


@runtime_checkable
class RunState(Protocol):
    """What the trainer hands over: the part of its state that is used here."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        ...

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        ...

    @property
    def components(self) -> Mapping[str, Any]:
        """Tokenizers and scheduler by name."""
        ...

    @property
    def log(self) -> Callable[[Mapping[str, float]], None]:
        """Writes scalars to the trackers."""
        ...

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The model with its averaged weights."""
        ...


@dataclass(frozen=True)
class HeldOutPicture:
    """A held-out picture with its texts.

    Args:
        image: The picture.
        caption: Its first caption.
        question: One of its questions, or None.
        answer: The true answer, or None.
    """

    image: Image.Image
    caption: str
    question: str | None
    answer: str | None


def held_out_pictures(manifest: Manifest, *, per_source: int = 4) -> list[HeldOutPicture]:
    """The first pictures of a held-out split of every source that has pictures in one.

    Args:
        manifest: Sources.
        per_source: Pictures of each source at most.
    """
    found = []
    for source in manifest.sources.values():
        split = next((name for name in HELD_OUT_SPLITS if source.count(name)), None)
        if split is None:
            continue
        samples = (s for s in iterate_samples(source, split) if s.image_bytes is not None)
        for place, sample in enumerate(islice(samples, per_source)):
            pairs = sample.record.qa
            pair = pairs[place % len(pairs)] if pairs else None
            found.append(
                HeldOutPicture(
                    Image.fromarray(sample.image),
                    sample.record.captions[0],
                    pair.question if pair else None,
                    pair.answer if pair else None,
                )
            )
    return found


class BackboneSamples:
    """Writes `samples/step_XXXXXXX.png` and `samples/captions.json` into the run's folder.

    Args:
        held_out: Pictures to describe.
        prompts: What to draw; those longer than the model's text window are left out.
        seed: Of the drawings, the same at every step so that sheets can be compared.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOutPicture] = (),
        *,
        prompts: Sequence[str] = PROMPTS,
        seed: int = 0,
    ) -> None:
        self.held_out = list(held_out)
        self.prompts = list(prompts)
        self.seed = seed

    def __call__(self, state: RunState) -> None:
        """Draw and describe with the averaged weights of this step."""
        folder = state.output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with state.averaged() as model:
            pipe = UnifiedTextToImagePipeline(
                transformer=cast(UnifiedTransformerModel, model),
                scheduler=state.components["scheduler"],
                tokenizer=state.components["tokenizer"],
                image_tokenizer=state.components["image_tokenizer"],
            )
            pipe.set_progress_bar_config(disable=True)
            self._draw(pipe, folder / f"step_{state.step:07d}.png")
            if self.held_out:
                state.log(self._describe(pipe, folder / "captions.json", state.step))

    def _draw(self, pipe: UnifiedTextToImagePipeline, path: Path) -> None:
        longest = pipe.processor.layout["max_window"]["text"] - 1  # One place is `<eos>`.
        prompts = [
            prompt
            for prompt in self.prompts
            if len(pipe.tokenizer.encode(prompt, add_special_tokens=False)) <= longest
        ]
        seeds = range(self.seed, self.seed + len(prompts))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw: Any = pipe
        images = draw(prompts, generator=generators).images
        contact_sheet(images, prompts).save(path)
        logger.info("Wrote %s.", path)

    def _describe(
        self, pipe: UnifiedTextToImagePipeline, path: Path, step: int
    ) -> dict[str, float]:
        """Captions and answers beside the truth; returns the share of right answers."""
        read: Any = UnifiedImageToTextPipeline.from_pipe(pipe)
        read.set_progress_bar_config(disable=True)
        captions = read([each.image for each in self.held_out]).texts
        asked = [each for each in self.held_out if each.question is not None]
        answers: list[str] = []
        if asked:
            answers = read([each.image for each in asked], [each.question for each in asked]).texts
        history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        history[f"{step:07d}"] = {
            "captions": [
                {"caption": caption, "truth": each.caption}
                for each, caption in zip(self.held_out, captions, strict=True)
            ],
            "answers": [
                {"question": each.question, "answer": answer, "truth": each.answer}
                for each, answer in zip(asked, answers, strict=True)
            ],
        }
        text = json.dumps(history, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        if not asked:
            return {}
        pairs = zip(asked, answers, strict=True)
        right = sum(exact_match(answer, each.answer or "") for each, answer in pairs)
        return {"samples/answers_right": right / len(asked)}


class ReconstructionSamples:
    """Writes `samples/step_XXXXXXX.png`: pictures above what an image tokenizer makes of them.

    Args:
        held_out: Pictures to encode and decode.
        columns: Pictures in a row.
    """

    def __init__(self, held_out: Sequence[HeldOutPicture], *, columns: int = 6) -> None:
        self.images = [each.image for each in held_out]
        self.columns = columns

    def __call__(self, state: RunState) -> None:
        """Encode and decode with the averaged weights of this step."""
        if not self.images:
            return
        folder = state.output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in self.images]))
        with torch.no_grad(), state.averaged() as model:
            tokenizer = cast(ImageTokenizer, model)
            given = pixels.permute(0, 3, 1, 2).float().to(tokenizer.device) / 255
            decoded = tokenizer.decode(tokenizer.encode(given)).float().clamp(0, 1).cpu()
        arrays = (decoded.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        made = [Image.fromarray(array) for array in arrays]
        rows = []
        for first in range(0, len(made), self.columns):
            part = slice(first, first + self.columns)
            rows.append([(image, "given") for image in self.images[part]])
            rows.append([(image, "decoded") for image in made[part]])
        path = folder / f"step_{state.step:07d}.png"
        grid_sheet(rows, cell=96).save(path)
        logger.info("Wrote %s.", path)
