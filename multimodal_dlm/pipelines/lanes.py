"""Forwards of a run: the branches of a step as rows of one forward, with plans, caches and levels.

A *lane* is a forward a step. It holds branches as rows of one canvas: window beside window, each
padded to its widest branch. A forward of few tokens costs its operators more than its arithmetic,
so that two branches in one forward cost little more than one; beyond `STACKED_TOKENS` nothing is
left to save, padding would only add columns, and branches have a lane each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.canvas import STRUCTURE_WINDOW, Canvas, LevelGroups
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import previous_columns
from multimodal_dlm.pipelines.guidance import Branch
from multimodal_dlm.pipelines.noise_groups import Group

# Tokens, padding included, up to which branches share a forward. Two forwards of 74 tokens took
# 100 ms and one of both 75 ms on 2 CPU cores; at 16 rows a branch the two ways cost the same.
STACKED_TOKENS = 1024

Run = tuple[int, int]  # A window and 0, or structure and which run of it.


class Lane:
    """Some branches as rows of one canvas; computes those rows that are asked for.

    Args:
        transformer: Backbone.
        names: Names of the branches, in the order of their rows.
        canvas: Rows of all branches, see `stack`; its ids are the lane's own.
    """

    def __init__(self, transformer: Any, names: Sequence[str], canvas: Canvas) -> None:
        self.transformer = transformer
        self.canvas = canvas
        num_rows = canvas.batch_size // len(names)
        self._first = {name: index * num_rows for index, name in enumerate(names)}
        self._num_rows = num_rows
        self._output: Any = None
        self._prepare(torch.arange(canvas.batch_size, device=canvas.device))

    def __contains__(self, branch: Branch) -> bool:
        return branch.name in self._first

    def _prepare(self, rows: Int[Tensor, " rows"]) -> None:
        """Plan and cache of some rows, from nothing."""
        self._hold(rows, self.canvas.select_rows(rows))
        self._plan = AttentionPlan.from_canvas(self._part)
        self._cache = self.transformer.new_cache(self._plan, self._part.is_free)

    def _hold(self, rows: Int[Tensor, " rows"], part: Canvas) -> None:
        """Make these the rows that are computed, in the order given."""
        self._rows, self._part = rows, part
        self._places = torch.zeros(self.canvas.batch_size, dtype=torch.long, device=rows.device)
        self._places[rows] = torch.arange(len(rows), device=rows.device)
        self._groups = LevelGroups.of(part)
        is_shifted = self.transformer.config["logits_shift"]
        self._sources = previous_columns(part.is_padding) if is_shifted else None

    def _focus(self, rows: Int[Tensor, " rows"]) -> None:
        """Compute these rows from now on: plan and cache follow, and begin anew for new ones.

        The last rows take the places of those that leave, so that a cache moves no others.
        """
        is_wanted = torch.isin(self._rows, rows)
        if int(is_wanted.sum()) < len(rows):
            self._prepare(rows)
            return
        if len(rows) == len(self._rows):
            return
        places = torch.arange(len(self._rows), device=rows.device)
        first, last = places.tensor_split([len(rows)])
        first[~is_wanted[first]] = last[is_wanted[last]]
        self._hold(self._rows[first], self._part.select_rows(first))
        self._plan = self._plan.select_rows(first)
        if self._cache is not None:
            self._cache.select_rows(first)

    def compute(
        self, branches: Sequence[Branch], rows: Int[Tensor, " rows"], groups: Sequence[Group] | None
    ) -> None:
        """One call of the backbone.

        Args:
            branches: Branches of this lane that take part, in its order.
            rows: Rows of each that are computed; all of them with a cache of Diffusers.
            groups: Groups whose states are asked for; None computes all columns without the cache.
        """
        if self.transformer.has_foreign_cache:  # It compares a batch with the one before.
            rows = torch.arange(self._num_rows, device=rows.device)
        self._focus(torch.cat([rows + self._first[branch.name] for branch in branches]))
        ids = self.canvas.input_ids[self._rows]
        cache = None if groups is None else self._cache
        if cache is not None and groups:
            parts = [group.columns(self.canvas) for group in groups]
            cache.read([column for part in parts for column in range(part.start, part.stop)])
        with self.transformer.cache_context("+".join(branch.name for branch in branches)):
            self._output = self.transformer(
                ids,
                noise_levels=self._groups.levels(self.transformer.vocabulary.is_masked(ids)),
                modality_ids=self._part.modality_ids,
                position_ids=self._part.position_ids,
                attention_plan=self._plan,
                kv_cache=cache,
                shift_states=False,
            )

    def states(
        self,
        branch: Branch,
        group: Group,
        rows: Int[Tensor, " picked"],
        positions: Int[Tensor, " picked"],
    ) -> Float[Tensor, "picked width"]:
        """States of the last forward at some rows of a branch and positions of a group."""
        places = self._places[rows + self._first[branch.name]]
        columns = positions + group.columns(self.canvas).start
        if self._sources is not None:
            columns = self._sources[places, columns]
        return self._output.hidden_states[places, columns]

    def token_quality(
        self, branch: Branch, group: Group
    ) -> Float[Tensor, "batch positions"] | None:
        """The same of what the backbone says of tokens; 0 in rows that were not computed."""
        quality = self._output.token_quality
        if quality is None:
            return None
        spread = quality.new_zeros((self.canvas.batch_size, quality.shape[1]))
        own = spread.index_copy_(0, self._rows, quality)[self._rows_of(branch)]
        return own[:, group.columns(self.canvas)]

    def write(self, branch: Branch, window: int, ids: Int[Tensor, "batch window"]) -> None:
        """Exchange the ids of one window of a branch; padding may follow them."""
        start = self.canvas.window_slice(window).start
        self.canvas.input_ids[self._rows_of(branch), start : start + ids.shape[1]] = ids

    def _rows_of(self, branch: Branch) -> slice:
        first = self._first[branch.name]
        return slice(first, first + self._num_rows)


class Forwards:
    """The branches of a run in their lanes; made anew when the canvas changes shape.

    Args:
        transformer: Backbone.
        branches: Branches, the conditional one first.
        num_forwards: Forwards of earlier canvases of the same run.

    Raises:
        CanvasError: When a free window has another length in a branch than in the canvas.
    """

    def __init__(self, transformer: Any, branches: Sequence[Branch], num_forwards: int = 0) -> None:
        self.branches = tuple(branches)
        self.num_forwards = num_forwards
        canvas = branches[0].canvas
        for window in canvas.free_windows():
            part = canvas.window_slice(window)
            for branch in branches:
                if branch.serves(window):
                    branch.part(window, part.stop - part.start)
        self._lanes = [
            Lane(transformer, [branch.name for branch in part], stack([b.canvas for b in part]))
            for part in share_out(branches)
        ]

    def __call__(
        self, branches: Sequence[Branch], rows: Tensor, groups: Sequence[Group] | None = None
    ) -> None:
        """Forwards of some branches and rows, for the states of some groups or of all columns."""
        for lane in self._lanes:
            taking = [branch for branch in branches if branch in lane]
            if taking:
                read = None
                if groups is not None:
                    read = [g for g in groups if any(b.serves(g.window) for b in taking)]
                lane.compute(taking, rows, read)
        self.num_forwards += len(branches)

    def lane(self, branch: Branch) -> Lane:
        """The lane of a branch."""
        return next(lane for lane in self._lanes if branch in lane)

    def write(self, canvas: Canvas, windows: Iterable[int]) -> None:
        """Copy written windows of the main canvas into the branches that serve them."""
        for window in windows:
            ids = canvas.input_ids[:, canvas.window_slice(window)]
            for branch in self.branches:
                if branch.serves(window):
                    self.lane(branch).write(branch, window, ids)


def share_out(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Branches side by side while their stacked canvas has at most `STACKED_TOKENS` tokens."""
    lanes: list[list[Branch]] = []
    for branch in branches:
        together = [*lanes[-1], branch] if lanes else [branch]
        widths = _widths([_runs(each.canvas) for each in together])
        num_tokens = sum(each.canvas.batch_size for each in together) * sum(widths.values())
        if lanes and widths and num_tokens <= STACKED_TOKENS:
            lanes[-1] = together
        else:
            lanes.append([branch])
    return lanes


def stack(canvases: Sequence[Canvas]) -> Canvas:
    """Rows of several canvases in one: each window and each run of structure in its own columns.

    Where a canvas has fewer columns of a window than another, or none, padding follows. Attention
    does not see it, so positions and levels of what is there stay. Orders become the number of
    columns of a lower order: what stands in the same columns opens at the same time in every row,
    also where each token has an order of its own.

    Args:
        canvases: Their windows have one order, see `share_out`; all on one device.
    """
    if len(canvases) == 1:
        return canvases[0].replace(input_ids=canvases[0].input_ids.clone())
    runs = [_runs(canvas) for canvas in canvases]
    widths = _widths(runs)
    wide = [_widened(canvas, own, widths) for canvas, own in zip(canvases, runs, strict=True)]
    made = Canvas(
        **{
            part.name: torch.cat([getattr(canvas, part.name) for canvas in wide])
            for part in fields(Canvas)
        }
    )
    return made.replace(order=(made.order[:, None] < made.order[:, :, None]).sum(dim=-1))


def _widened(canvas: Canvas, runs: Mapping[Run, range], widths: Mapping[Run, int]) -> Canvas:
    """A canvas with padding after each run, up to the width given."""
    columns: list[int] = []
    is_there: list[bool] = []
    windows: list[int] = []
    last = 0
    for run, width in widths.items():
        own = runs.get(run, range(0))
        missing = width - len(own)
        last = own[-1] if own else last
        columns += [*own, *[last] * missing]
        is_there += [True] * len(own) + [False] * missing
        windows += [run[0]] * width
    made = canvas.select_columns(torch.tensor(columns, device=canvas.device))
    there = torch.tensor(is_there, device=canvas.device)
    return made.replace(
        window_ids=torch.tensor(windows, device=canvas.device).expand_as(made.window_ids),
        is_free=made.is_free & there,
        is_padding=made.is_padding | ~there,
    )


def _runs(canvas: Canvas) -> dict[Run, range]:
    """Columns of each window and of each run of structure, in canvas order."""
    runs: dict[Run, range] = {}
    values, counts = torch.unique_consecutive(canvas.window_ids[0], return_counts=True)
    column = num_structures = 0
    for window, count in zip(values.tolist(), counts.tolist(), strict=True):
        runs[window, num_structures if window == STRUCTURE_WINDOW else 0] = range(
            column, column + count
        )
        num_structures += window == STRUCTURE_WINDOW
        column += count
    return runs


def _widths(runs: Sequence[Mapping[Run, range]]) -> dict[Run, int]:
    """The most columns of each run, in an order all canvases keep; none where there is no such."""
    order: list[Run] = []
    for own in runs:
        place = 0
        for run in own:
            if run not in order:
                order.insert(place, run)
            if order.index(run) < place:
                return {}
            place = order.index(run) + 1
    return {run: max(len(own.get(run, ())) for own in runs) for run in order}
