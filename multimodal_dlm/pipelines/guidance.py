"""Classifier-free guidance as weighted branches.

A branch is a canvas with a weight; the guided logits are sum_b w_b logits_b. Two branches with
weights g and 1 - g give u + g (c - u) (Ho and Salimans 2022, arXiv 2207.12598); a negative prompt
only changes what the second branch holds. LLaDA-family `cfg_scale` is g - 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import CanvasError

CONDITIONAL = "cond"
UNCONDITIONAL = "uncond"


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


def is_guided(step: int, num_steps: int, start: float, stop: float) -> bool:
    """True when guidance acts in this step: start <= step / num_steps < stop."""
    return start <= step / num_steps < stop


def restrict(branches: Sequence[Branch], guided: bool) -> tuple[Branch, ...]:
    """The branches of a step: all of them, or outside the window the first alone."""
    if guided:
        return tuple(branches)
    return (replace(branches[0], weight=1.0),)
