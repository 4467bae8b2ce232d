"""Any ranks, workers and shards: the same samples in the same order, from every batch on.

Workers of the grid are simulated in this process, one reader each, as a loader would have them; a
few loaders with real workers show that the simulation is true.
"""

import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from multimodal_dlm.datasets import Manifest, MixtureReader, TrainingExample, mixture, open_manifest
from multimodal_dlm.datasets.mixture import global_state
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.errors import DataError
from tests.datasets.toy import SIZES, toy_mixture, write_toy

BATCH = 12
TOTAL = 9  # Batches: 38 samples are four batches an epoch, so two epoch ends lie within.
SHARD_SIZES = {1: 25, 2: 13, 5: 5}
GRID = [(r, w, s) for r in (1, 2, 3) for w in (0, 1, 2, 4) for s in SHARD_SIZES]
Batches = list[list[TrainingExample]]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[int, Manifest]:
    """A mixture whose first source has that many shards."""
    made = {}
    for shards, size in SHARD_SIZES.items():
        root = tmp_path_factory.mktemp(f"shards{shards}")
        made[shards] = toy_mixture(root)
        write_toy(root, "shapes", shard_size=size)
        made[shards] = open_manifest(root / "mixture.yaml")
        assert len(made[shards].sources["shapes"].splits["train"]) == shards
    return made


class SimulatedLoader:
    """One rank's loader: a reader for each worker, asked in turn, with what they saved last."""

    def __init__(self, manifest: Manifest, rank: int, ranks: int, workers: int, patch: Any) -> None:
        self.patch, self.workers, self.turn = patch, workers, 0
        self.readers = [
            MixtureReader(manifest, batch_size=BATCH, rank=rank, world_size=ranks)
            for _ in range(max(workers, 1))
        ]
        self.streams = [iter(reader) for reader in self.readers]

    def _as_worker(self, number: int) -> None:
        info = SimpleNamespace(id=number, num_workers=self.workers) if self.workers else None
        self.patch.setattr(mixture, "get_worker_info", lambda: info)

    def load(self, state: dict[str, Any]) -> None:
        """A global record into every worker, or each worker's own."""
        states = state.get("workers") or [state] * len(self.readers)
        self.turn = state.get("turn", 0)
        for number, (reader, own) in enumerate(zip(self.readers, states, strict=True)):
            self._as_worker(number)
            reader.load_state_dict(own)

    def take(self, count: int) -> Batches:
        batches = []
        for _ in range(count):
            self._as_worker(self.turn)
            batches.append(next(self.streams[self.turn]))
            self.turn = (self.turn + 1) % len(self.readers)
        return batches

    def state(self) -> dict[str, Any]:
        states = []
        for number, reader in enumerate(self.readers):
            self._as_worker(number)
            states.append(reader.state_dict())
        return {"workers": states, "turn": self.turn}

    def global_state(self) -> dict[str, Any]:
        workers = {
            f"worker_{number}": {
                "dataset_state": state,
                "fetcher_state": {"dataset_iter_state": None},
            }
            for number, state in enumerate(self.state()["workers"])
        }
        snapshot = {"_worker_snapshots": workers}
        return global_state({"_snapshot": snapshot, "_steps_since_snapshot": 0})


def joined(ranks: list[Batches]) -> Batches:
    return [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]


@pytest.fixture
def simulated(monkeypatch):
    records = {}
    read = ShardReader.record

    def cached(reader, index):  # Reading is not what is tested here, and is most of the time.
        key = (reader.shards[0].path, index)
        if key not in records:
            records[key] = read(reader, index)
        return records[key]

    monkeypatch.setattr(ShardReader, "record", cached)

    def run(manifest, ranks, workers, count, state=None):
        loaders = [SimulatedLoader(manifest, r, ranks, workers, monkeypatch) for r in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load(state)
        states = []
        batches = []
        for _ in range(count):
            states.append((loaders[0].state(), loaders[0].global_state()))
            batches += joined([loader.take(1) for loader in loaders])
        return batches, states

    return run


@pytest.fixture(scope="module")
def straight(manifests) -> dict[int, Batches]:
    """What one process without workers reads."""
    return {
        shards: list(islice(MixtureReader(manifest, batch_size=BATCH), TOTAL + 4))
        for shards, manifest in manifests.items()
    }


@pytest.mark.parametrize("shards", SHARD_SIZES)
def test_the_straight_order_holds_every_sample_as_often_as_any_other(straight, shards):
    two_epochs = [row for batch in straight[shards][:8] for row in batch if row.weight]
    assert len(two_epochs) == 80
    for source, size in SIZES.items():
        counts = Counter(row.index for row in two_epochs if row.source == source)
        passes = counts.total() // size
        assert set(counts) == set(range(size))
        assert set(counts.values()) == {passes, passes + 1}


@pytest.mark.parametrize(("ranks", "workers", "shards"), GRID)
def test_every_interruption_and_every_change_of_size_keeps_the_order(
    manifests, straight, simulated, ranks, workers, shards
):
    manifest, whole = manifests[shards], straight[shards]
    batches, states = simulated(manifest, ranks, workers, TOTAL)
    assert batches == whole[:TOTAL]
    assert Counter(row.key for batch in batches for row in batch) == Counter(
        row.key for batch in whole[:TOTAL] for row in batch
    )
    place = GRID.index((ranks, workers, shards))
    for stop, (own, everyones) in enumerate(states):
        assert everyones == MixtureReader(manifest, batch_size=BATCH).state_at(stop)
        assert len(json.dumps(everyones)) <= 4096
        again, _ = simulated(manifest, ranks, workers, 1, own)
        assert again == whole[stop : stop + 1]
        other_ranks, other_workers, _ = GRID[(place + 7 * stop + 5) % len(GRID)]
        rest, _ = simulated(manifest, other_ranks, other_workers, 2, everyones)
        assert rest == whole[stop : stop + 2]


def loader_of(manifest: Manifest, workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(
        MixtureReader(manifest, batch_size=BATCH),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "stop"), [(0, 4), (1, 4), (2, 3), (4, 5)])
def test_real_loaders_continue_on_their_own_and_on_other_workers(
    manifests, straight, workers, stop
):
    whole = straight[1]  # One shard: fewer than workers.
    loader = loader_of(manifests[1], workers)
    stream = iter(loader)
    assert [next(stream) for _ in range(stop)] == whole[:stop]
    state = json.loads(json.dumps(loader.state_dict()))
    del stream, loader
    same = loader_of(manifests[1], workers)
    same.load_state_dict(state)
    again = iter(same)
    if workers < 2:
        assert global_state(same.state_dict()) == global_state(state)  # Right after loading.
    assert list(islice(again, 3)) == whole[stop : stop + 3]
    del again, same
    reader = MixtureReader(manifests[1], batch_size=BATCH)
    reader.load_state_dict(global_state(state))
    other = DataLoader(
        reader, batch_size=None, num_workers=1 if workers != 1 else 0,
        multiprocessing_context="fork" if workers != 1 else None,
    )  # fmt: skip
    assert list(islice(other, 3)) == whole[stop : stop + 3]


def test_states_that_cannot_be_continued_are_refused(manifests, monkeypatch):
    reader = MixtureReader(manifests[1], batch_size=BATCH)
    with pytest.raises(DataError, match="continued by one of 2 workers; got 1"):
        reader.load_state_dict({**reader.state_dict(), "num_workers": 2})
    with pytest.raises(DataError, match="StatefulDataLoader over a MixtureReader.*KeyError"):
        global_state({"something": 1})
    with pytest.raises(DataError, match="snapshot_every_n_steps"):
        global_state({"_snapshot": {}, "_steps_since_snapshot": 2})
