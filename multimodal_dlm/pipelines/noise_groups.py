"""Which parts of a canvas are written together, and in which order.

A noise group is the part of a window with one attention order: the whole window, or one block of
it. A group opens when every group of lower order is closed, so blocks, scales and chained
modalities are the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import CanvasError


@dataclass(frozen=True)
class Group:
    """A noise group with free positions: the part of a window with one attention order.

    Args:
        window: Window id.
        order: Attention order; a group opens when every group of lower order is closed.
        modality: Name of its modality.
        start: First column, counted from the start of its window.
        stop: One past the last column, counted from the start of its window.
    """

    window: int
    order: int
    modality: str
    start: int
    stop: int

    def columns(self, canvas: Canvas) -> slice:
        """Columns of the group in a canvas that has its window."""
        first = canvas.window_slice(self.window).start
        return slice(first + self.start, first + self.stop)


def noise_groups(canvas: Canvas, modalities: Sequence[str]) -> list[list[Group]]:
    """The groups with free positions, one list per attention order, lowest first.

    Raises:
        CanvasError: When a column has different orders in different rows, or a group is torn.
    """
    groups = []
    for window in canvas.free_windows():
        part = canvas.window_slice(window)
        order = canvas.order[:, part]
        if bool((order != order[:1]).any()):
            raise CanvasError(
                f"Free window {window} must have the same attention order in every row. Run rows of"
                " different tasks in separate calls."
            )
        is_free = canvas.is_free[:, part].any(dim=0)
        for value in sorted(set(order[0].tolist())):
            columns = (order[0] == value).nonzero().flatten()
            first, last = int(columns[0]), int(columns[-1])
            if last - first + 1 != len(columns):
                raise CanvasError(f"Order {value} of window {window} must be one run of columns.")
            if bool(is_free[columns].any()):
                modality = modalities[canvas.window_modality(window)]
                groups.append(Group(window, value, modality, first, last + 1))
    orders = sorted({group.order for group in groups})
    return [[group for group in groups if group.order == order] for order in orders]


def stage_steps(stages: Sequence[Sequence[Group]], num_inference_steps: int) -> list[int]:
    """Steps of each stage: a window shares its steps among the blocks it is written in."""
    blocks: dict[int, int] = {}
    for stage in stages:
        for group in stage:
            blocks[group.window] = blocks.get(group.window, 0) + 1
    return [
        max(-(-num_inference_steps // blocks[group.window]) for group in stage) for stage in stages
    ]
