"""Classifier-free guidance as weighted branches.

A branch is a canvas with a weight; the guided logits are sum_b w_b logits_b. Two branches with
weights g and 1 - g give u + g (c - u) (Ho and Salimans 2022, arXiv 2207.12598); a negative prompt
only changes what the second branch holds. LLaDA-family `cfg_scale` is g - 1.

Guidance may act in an interval of the steps (Kynkäänniemi et al. 2024, arXiv 2404.07724), and its
scale may rise there, see `SCHEDULES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import CanvasError

CONDITIONAL = "cond"
UNCONDITIONAL = "uncond"

# Place in the guided steps, 0 the first and 1 the last -> the share s of guidance that acts; the
# scale is then 1 + s (g - 1). In masked diffusion strong guidance harms while most tokens are
# masked and helps late (Rojas et al. 2025, arXiv 2507.08965). `linear` is that of Muse (Chang et
# al. 2023, arXiv 2301.00704); `cosine` is one of Wang et al. 2024 (arXiv 2404.13040), here without
# their normalisation to the area of a constant scale.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda place: place,
    "cosine": lambda place: (1.0 - math.cos(math.pi * place)) / 2.0,
}


@dataclass(frozen=True)
class Branch:
    """One of the canvases whose logits make a guided step.

    Args:
        name: Its name; those of the branches of a forward are given to `cache_context`, joined
            by `+`.
        canvas: What the backbone sees; its free windows have the lengths of the main canvas.
        weight: Weight of its logits; the weights of all branches sum to 1.
        windows: Windows whose logits it takes part in; None means all. A window that only some
            branches serve takes their weights divided by their sum.
    """

    name: str
    canvas: Canvas
    weight: float
    windows: tuple[int, ...] | None = None

    def serves(self, window: int) -> bool:
        """True when its logits count for a window."""
        return self.windows is None or window in self.windows

    def part(self, window: int, length: int) -> slice:
        """Columns of a window, which must have the length it has in the main canvas."""
        part = self.canvas.window_slice(window)
        if part.stop - part.start != length:
            raise CanvasError(
                f"Window {window} must have the same length in every branch; got"
                f" {part.stop - part.start} in `{self.name}` and {length}."
            )
        return part


BranchBuilder = Callable[[Canvas], Sequence[Branch]]


def conditional_only(canvas: Canvas) -> tuple[Branch, ...]:
    """Guidance off: the canvas itself, weight 1."""
    return (Branch(CONDITIONAL, canvas, 1.0),)


def classifier_free(
    unconditional: Callable[[Canvas], Canvas],
    guidance_scale: float,
    windows: tuple[int, ...] | None = None,
) -> BranchBuilder:
    """Branches for logits u + g (c - u).

    Args:
        unconditional: Canvas -> the canvas without its condition.
        guidance_scale: g; 1.0 builds one branch only.
        windows: Windows the unconditional branch takes part in; None means all.
    """
    if guidance_scale == 1.0:
        return conditional_only

    def build(canvas: Canvas) -> tuple[Branch, ...]:
        return (
            Branch(CONDITIONAL, canvas, guidance_scale),
            Branch(UNCONDITIONAL, unconditional(canvas), 1.0 - guidance_scale, windows),
        )

    return build


def combine(
    logits: Mapping[str, Float[Tensor, "*shape columns"]], weights: Mapping[str, float]
) -> Float[Tensor, "*shape columns"]:
    """sum_b w_b logits_b / sum_b w_b in float32; a single branch is returned as it is."""
    if len(logits) == 1:
        return next(iter(logits.values())).float()
    total = sum(weights[name] for name in logits)
    combined: Tensor | None = None
    for name, values in logits.items():
        part = values.float() * (weights[name] / total)
        combined = part if combined is None else combined + part
    if combined is None:
        raise CanvasError("Every free window must be served by a branch; one has none.")
    return combined


def guidance_share(
    step: int, num_steps: int, start: float, stop: float, schedule: str = "constant"
) -> float:
    """Share of guidance that acts in a step: 0 is off, 1 the full scale.

    Args:
        step: Index of the step.
        num_steps: Steps in all.
        start: Guidance acts where start <= step / num_steps < stop.
        stop: As `start` says.
        schedule: One of `SCHEDULES`, over the steps in which guidance acts; one step alone has
            the full scale.
    """
    guided = [index for index in range(num_steps) if start <= index / num_steps < stop]
    if step not in guided:
        return 0.0
    if len(guided) == 1:
        return 1.0
    return SCHEDULES[schedule]((step - guided[0]) / (len(guided) - 1))


def scaled(branches: Sequence[Branch], share: float) -> tuple[Branch, ...]:
    """The branches of a step in which a share of guidance acts; at 0 the first alone.

    Every weight moves from that of the first branch alone, (1, 0, 0, ...), to its own, so that
    they sum to 1 at every share; of two branches the scale is 1 + share (g - 1).
    """
    first, *others = branches
    if share == 0.0:
        return (replace(first, weight=1.0),)
    if share == 1.0:
        return tuple(branches)
    return (
        replace(first, weight=1.0 + share * (first.weight - 1.0)),
        *(replace(branch, weight=share * branch.weight) for branch in others),
    )
