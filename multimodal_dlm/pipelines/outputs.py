"""What the pipelines return."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class UnifiedImageOutput(BaseOutput):
    """Pictures.

    Args:
        images: By `output_type`: `pil` a list of PIL images (each with its recipe in
            `image.info["recipe"]`), `np` float32 (batch, height, width, 3) in [0, 1], `pt` float32
            (batch, 3, height, width) in [0, 1], `codes` a tuple over levels of (batch, h, w).
    """

    images: Any


@dataclass
class UnifiedTextOutput(BaseOutput):
    """Texts.

    Args:
        sequences: Codes of the text tokenizer over the whole window, `<eos>` and `<fill>` included,
            (batch, gen_length).
        texts: Decoded up to the first `<eos>`; None with `output_type="seq"`.
    """

    sequences: Tensor
    texts: list[str] | None = None


@dataclass
class UnifiedJointOutput(BaseOutput):
    """Pictures with their captions.

    Args:
        images: As in `UnifiedImageOutput`.
        sequences: As in `UnifiedTextOutput`.
        texts: One caption per picture.
    """

    images: Any
    sequences: Tensor
    texts: list[str]
