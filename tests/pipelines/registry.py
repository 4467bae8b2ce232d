"""One row per pipeline for the contract tests: how to call it on some rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedPipeline,
    UnifiedTextGenerationPipeline,
    UnifiedTextToImagePipeline,
)
from tests.pipelines.tiny import IMAGE_SIZE, MAX_TEXT


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of three rows, and arguments that make its output plain ids."""

    pipeline: type[UnifiedPipeline]
    rows: tuple[dict[str, Any], ...]
    plain: dict[str, Any]
    options: dict[str, Any]
    has_guidance: bool = True

    def arguments(self, *indexes: int) -> dict[str, Any]:
        """Keyword arguments of a call on some of the rows."""
        chosen = [self.rows[index] for index in indexes]
        if self.pipeline is UnifiedJointPipeline:
            return {"num_samples": len(chosen), **self.options}
        return {**{name: [row[name] for row in chosen] for name in chosen[0]}, **self.options}


def picture(seed: int) -> Tensor:
    """Random blobs, (3, size, size) in [0, 1]."""
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, IMAGE_SIZE, mode="nearest")[0]


def hole(start: int, stop: int) -> Tensor:
    """A mask (size, size) whose rows start..stop - 1 are white."""
    mask = torch.zeros(IMAGE_SIZE, IMAGE_SIZE)
    mask[start:stop] = 1.0
    return mask


PROMPTS = ("a red apple", "a green pear and a blue circle", "")
QUESTIONS = ("what colour is the circle?", "is there a square?", "what?")

CASES = (
    Case(
        UnifiedTextToImagePipeline,
        tuple({"prompt": prompt} for prompt in PROMPTS),
        {"output_type": "codes"},
        {"num_inference_steps": 6, "guidance_scale": 2.0},
    ),
    Case(
        UnifiedImageToTextPipeline,
        tuple({"image": picture(i), "question": QUESTIONS[i]} for i in range(3)),
        {"output_type": "seq"},
        {"gen_length": 8, "guidance_scale": 1.5},
    ),
    Case(
        UnifiedTextGenerationPipeline,
        tuple({"prompt": question} for question in QUESTIONS),
        {"output_type": "seq"},
        {"gen_length": MAX_TEXT, "num_inference_steps": 4},
    ),
    Case(
        UnifiedJointPipeline,
        ({}, {}, {}),
        {"output_type": "codes"},
        {"gen_length": 6, "num_inference_steps": 12},
    ),
    Case(
        UnifiedInpaintPipeline,
        tuple(
            {"prompt": PROMPTS[i], "image": picture(i), "mask_image": hole(0, 8 * (i + 1))}
            for i in range(3)
        ),
        {"output_type": "codes"},
        {"num_inference_steps": 5, "guidance_scale": 2.0},
    ),
)


def plain(output: Any) -> list[Tensor]:
    """All tensors and texts of an output as a flat list, for comparison."""
    values: list[Any] = list(output.values()) if hasattr(output, "values") else list(output)
    flat: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, tuple):
            flat += value
        elif value is not None:
            flat.append(value)
    return flat


def same(left: Any, right: Any) -> bool:
    """True when two outputs hold the same ids and texts."""
    pairs = list(zip(plain(left), plain(right), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else list(a) == list(b) for a, b in pairs)
