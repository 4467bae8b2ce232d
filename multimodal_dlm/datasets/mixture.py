"""The stream of training examples: slot s of epoch e is a pure function of (seed, e, s).

Sources share blocks of slots by exact quotas, tasks share each source's draws the same way, and a
counter-based generator keyed by (seed, epoch, slot) picks captions, questions and window lengths.
Nothing is remembered but the number of the next batch: a reader resumes exactly, on any number of
ranks and workers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from multimodal_dlm.datasets.asking import QuestionWeights
from multimodal_dlm.datasets.manifest import Manifest, Source
from multimodal_dlm.datasets.ordering import QuotaOrder, SourceOrder
from multimodal_dlm.datasets.reading import missing_split
from multimodal_dlm.datasets.row_reading import open_reader
from multimodal_dlm.datasets.sampling import KeyedDraws, pick
from multimodal_dlm.datasets.schema import Record
from multimodal_dlm.datasets.selection import (
    FILLED,
    YIELDED,
    Selection,
    check_budget,
    select,
    selection_digest,
    unusable_samples,
)
from multimodal_dlm.datasets.templates import fill_template
from multimodal_dlm.datasets.weighting import slot_shares
from multimodal_dlm.errors import ConfigError, DataError

QUESTION_TASKS = ("vqa", "text")
_STATE_FORMAT = "multimodal_dlm.mixture_state/1"


@dataclass(frozen=True)
class TrainingExample:
    """What one training row is made of, before tokens.

    Args:
        source: Name of the source.
        split: Split of the source.
        index: Number of the sample in that split, for codes encoded beforehand.
        key: Key of the sample.
        task: What is free, one of `processing.TASKS`.
        instruction: Question, or None.
        text: Caption or answer.
        window_draw: A uniform number that sets the length of a free text window.
        mask_draw: A uniform number for the objective's own choices, such as rectangular holes.
        record: The whole record.
        outcome: `yielded`; `filled` for a row that only fills the last batch of an epoch; for a
            skipped sample the reason: then the row shows another sample.
        row: Number of the row in the run, rows that fill a batch included.
    """

    source: str
    split: str
    index: int
    key: str
    task: str
    instruction: str | None
    text: str
    window_draw: float
    mask_draw: float
    record: Record
    outcome: str = YIELDED
    row: int = 0

    @property
    def weight(self) -> float:
        """1, or 0 for a row that does not count."""
        return float(self.outcome == YIELDED)

    @property
    def sample_index(self) -> tuple[str, int]:
        """Source and number: where codes encoded beforehand are kept."""
        return self.source, self.index


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch must hold.

    Args:
        batch_size: Rows of a global batch.
        num_batches: Global batches.
        slots: Rows of each source, those that only fill the last batch left out.
        selections: What is drawn of each source.
    """

    batch_size: int
    num_batches: int
    slots: Mapping[str, int]
    selections: Mapping[str, Selection]

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.batch_size * self.num_batches


class MixtureReader(IterableDataset[list[TrainingExample]]):
    """Global batches of a mixture, or one rank's slice of them, without end.

    Batch g of an epoch is slots g * batch_size up to (g + 1) * batch_size; rank r takes the r-th
    slice. As a `DataLoader` dataset (with `batch_size=None`) workers take whole batches in turn, so
    the order does not depend on their number. Never pass that loader through
    `accelerator.prepare`, which would drop data.

    Args:
        manifest: Sources with weights and tasks.
        split: Split to read.
        seed: Seed of the run.
        batch_size: Rows of the global batch.
        rank: This process.
        world_size: Number of processes; divides `batch_size`.
        max_skipped: Unusable samples of a source that may be skipped, a share of them (below 1) or
            a number; every byte is read to find them. 0 stops at the first, when it is drawn.

    Raises:
        ConfigError: When `world_size` does not divide `batch_size` or `rank` is out of range.
        DataError: When no source has the split, one has no tasks, a filter leaves nothing, or more
            than `max_skipped` samples are unusable.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_skipped: float = 0,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"`world_size` must divide the global `batch_size`; got {world_size} and"
                f" {batch_size}. Use a batch size of {math.ceil(batch_size / world_size)} x"
                f" {world_size}."
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"`rank` must lie in 0..{world_size - 1}; got {rank}.")
        self.sources = {n: s for n, s in manifest.sources.items() if s.count(split)}
        if not self.sources:
            raise missing_split(split, list(manifest.sources.values()))
        for name, source in self.sources.items():
            if not any(source.tasks.values()):
                raise DataError(f"Source `{name}` must have task shares; got {source.tasks}.")
        self.split, self.seed = split, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.fingerprint = manifest.fingerprint
        self.next_batch = 0
        self._is_own_turn = False  # `next_batch` is this worker's, not that of all workers.
        self.readers = {
            name: open_reader(source, split, is_lenient=max_skipped > 0)
            for name, source in self.sources.items()
        }
        self.selections = {
            name: self._select(source, max_skipped) for name, source in self.sources.items()
        }
        self._selection = selection_digest(self.selections)
        self._asking = {
            name: QuestionWeights(
                (reader.record(index) for index in self.selections[name].good_numbers()),
                by_type=self.sources[name].question_weights,
                balance_answers=self.sources[name].balance_answers,
            )
            for name, reader in self.readers.items()
            if self.sources[name].balance_answers or self.sources[name].question_weights
        }
        shares, total = slot_shares(
            {name: source.weight for name, source in self.sources.items()},
            {name: selection.size for name, selection in self.selections.items()},
            temperature=manifest.temperature,
            passes={n: s.passes for n, s in self.sources.items() if s.passes is not None},
        )
        self._mixture = QuotaOrder(shares, seed=seed, stream="sources")
        self._tasks = {
            name: QuotaOrder(source.tasks, seed=seed, stream=f"tasks/{name}")
            for name, source in self.sources.items()
        }
        self._samples = {
            name: SourceOrder(selection.counts, seed=seed, stream=name)
            for name, selection in self.selections.items()
        }
        self.slots_per_epoch = math.ceil(total / self._mixture.size) * self._mixture.size
        self.batches_per_epoch = math.ceil(self.slots_per_epoch / batch_size)

    def _select(self, source: Source, max_skipped: float) -> Selection:
        """What is drawn of a source; without a budget nothing is looked for that is not asked."""
        reader, where = self.readers[source.name], f"`{source.name}`, split `{self.split}`"
        skipped = unusable_samples(reader) if max_skipped else {}
        check_budget(skipped, len(reader), max_skipped, where)
        return select(reader, source.filter, skipped, where)

    @property
    def epoch_plan(self) -> EpochPlan:
        """What every epoch must hold."""
        blocks = self.slots_per_epoch // self._mixture.size
        slots = {name: quota * blocks for name, quota in self._mixture.quotas.items()}
        return EpochPlan(self.batch_size, self.batches_per_epoch, slots, self.selections)

    def __iter__(self) -> Iterator[list[TrainingExample]]:
        _, stride = self._worker()
        self.next_batch, self._is_own_turn = self._turn(), stride > 1
        while True:
            batch = self.batch(self.next_batch)
            self.next_batch += stride
            yield batch

    def _worker(self) -> tuple[int, int]:
        """Number of this loader worker and of all of them."""
        worker = get_worker_info()
        return (worker.id, worker.num_workers) if worker is not None else (0, 1)

    def _turn(self) -> int:
        """The batch that this worker yields next: workers take whole batches in turn."""
        return self.next_batch if self._is_own_turn else self.next_batch + self._worker()[0]

    def batch(self, number: int) -> list[TrainingExample]:
        """This rank's rows of global batch `number`, counted through all epochs.

        The last batch of an epoch is filled with rows of weight 0.
        """
        epoch, place = divmod(number, self.batches_per_epoch)
        rows = self.batch_size // self.world_size
        first = place * self.batch_size + self.rank * rows
        return [self.example(epoch, slot) for slot in range(first, first + rows)]

    def example(self, epoch: int, slot: int) -> TrainingExample:
        """The example of one slot; slots beyond the epoch repeat it with weight 0.

        A skipped sample's row has weight 0 too and shows the next good sample of its source.

        Raises:
            DataError: When the sample is unusable or lacks what its task needs.
        """
        row = epoch * self.batches_per_epoch * self.batch_size + slot
        is_padding = slot >= self.slots_per_epoch
        slot %= self.slots_per_epoch
        name, draw = self._mixture[epoch * self.slots_per_epoch + slot]
        source = self.sources[name]
        task, _ = self._tasks[name][draw]
        selection, place = self.selections[name], self._samples[name][draw]
        index = selection.number(place)
        outcome = FILLED if is_padding else selection.skipped.get(index, YIELDED)
        if index in selection.skipped:
            index = selection.stand_in(place)
        record = self.readers[name].record(index)
        choice, window, mask_draw = KeyedDraws(self.seed, "example", epoch, slot).uniforms(3)
        instruction, text = task_texts(
            record,
            task,
            float(choice),
            source.caption_weights,
            self._asking.get(name),
            source.templates,
        )
        return TrainingExample(
            source=name,
            split=self.split,
            index=index,
            key=record.key,
            task=task,
            instruction=instruction,
            text=text,
            window_draw=float(window),
            mask_draw=float(mask_draw),
            record=record,
            outcome=outcome,
            row=row,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position as a small JSON record; in a loader worker, that of the worker.

        A `StatefulDataLoader` keeps one of each worker. `global_state` makes one of them all, which
        continues on any number of workers.
        """
        state = self.state_at(self._turn())
        stride = self._worker()[1]
        return {**state, "num_workers": stride} if stride > 1 else state

    def state_at(self, next_batch: int) -> dict[str, Any]:
        """The position before batch `next_batch`: for trainers that count batches themselves."""
        state = {
            "format": _STATE_FORMAT,
            "next_batch": next_batch,
            "seed": self.seed,
            "split": self.split,
            "batch_size": self.batch_size,
            "manifest": self.fingerprint,
        }
        return state | ({"selection": self._selection} if self._selection else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken, on any number of ranks.

        Raises:
            DataError: When the state belongs to another order.
        """
        own = self.state_at(0)
        for name in ("format", "seed", "split", "batch_size", "manifest", "selection"):
            if state.get(name) != own.get(name):
                raise DataError(
                    f"The reader's `{name}` must be that of the saved state to continue its order;"
                    f" got {own.get(name)!r} and {state.get(name)!r}. Resume with the same settings"
                    " or start a new run."
                )
        theirs, ours = state.get("num_workers", 1), self._worker()[1]
        if theirs not in (1, ours):
            raise DataError(
                f"A worker's state must be continued by one of {theirs} workers; got {ours}. Use"
                " `global_state` of the loader's state: it continues on any number."
            )
        self.next_batch = int(state["next_batch"])
        self._is_own_turn = theirs > 1


def global_state(loader_state: Mapping[str, Any]) -> dict[str, Any]:
    """One record for `MixtureReader.load_state_dict` from the state of a `StatefulDataLoader`.

    What workers had prepared but the loop had not taken is not counted: it comes again.

    Args:
        loader_state: As its `state_dict` gave it, of any number of workers.

    Raises:
        DataError: When it is not the state of a loader over a `MixtureReader`.
    """
    try:
        if "_snapshot" in loader_state:
            if loader_state["_steps_since_snapshot"]:
                raise ValueError("`snapshot_every_n_steps` above 1")
            workers = loader_state["_snapshot"]["_worker_snapshots"].values()
            states = [worker["fetcher_state"]["dataset_iter_state"] or worker["dataset_state"]
                      for worker in workers]  # fmt: skip
        else:
            states = [loader_state["dataset_state"]]
        first = min(states, key=lambda state: int(state["next_batch"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "The loader's state must be that of a StatefulDataLoader over a MixtureReader, taken at"
            f" every step; got {type(error).__name__}: {error}. Count batches and use"
            " `MixtureReader.state_at` instead."
        ) from error
    return {name: value for name, value in first.items() if name != "num_workers"}


def task_texts(
    record: Record,
    task: str,
    u: float,
    caption_weights: Mapping[str, Any],
    asking: QuestionWeights | None = None,
    templates: Sequence[str] = (),
) -> tuple[str | None, str]:
    """Instruction and text of a record for a task.

    Args:
        record: The sample's record.
        task: A question for `vqa` and `text`, a caption otherwise.
        u: Uniform number in [0, 1) that picks among them.
        caption_weights: Weights of the captions by task; evenly where a task has none.
        asking: Weights of the questions; None asks them evenly.
        templates: Make the captions, in the place of the record's own.

    Raises:
        DataError: When the record has no questions, fewer captions than weights, or lacks a field
            of a template.
    """
    if task in QUESTION_TASKS:
        if not record.qa:
            raise DataError(
                f"Sample {record.key} of `{record.source}` must have questions for task `{task}`;"
                " it has none. Take the task out of the source's shares."
            )
        weights = [1.0] * len(record.qa) if asking is None else asking.weights(record)
        asked = record.qa[pick(u, weights)]
        return asked.question, asked.answer
    captions = templates or record.captions
    weights = caption_weights.get(task) or [1] * len(captions)
    if len(weights) != len(captions):
        raise DataError(
            f"`caption_weights.{task}` must have one weight for each caption; got {len(weights)}"
            f" for the {len(captions)} captions of sample {record.key}."
        )
    chosen = captions[pick(u, weights)]
    return None, fill_template(chosen, record) if templates else chosen
