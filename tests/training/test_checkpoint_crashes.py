"""Power cuts and full disks at every operation of a save, on a model of what a disk may keep.

The model is harsher than ext4: until its folder is synced, each change of an entry is kept or lost
on its own, and until a file is synced its content may be missing, empty or cut off.
"""

import errno
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from multimodal_dlm.errors import CheckpointError
from multimodal_dlm.training.checkpoint import (
    Checkpoint,
    Disk,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

BEST_BEFORE, OLD, NEW = 0, 1, 2
STEMS = ("ema", "model", "optimizer", "rng")
Edit = tuple[str, int, object]


def checkpoint(step: int, best: int | None = None) -> Checkpoint:
    tensors = {stem: {"w": torch.arange(4.0) + step} for stem in STEMS}
    return Checkpoint(step, tensors, {"x": step, "best": {"step": best}})


class RecordingDisk(Disk):
    """Does every operation and notes it."""

    def __init__(self) -> None:
        self.operations: list[tuple] = []

    def make_folder(self, path):
        super().make_folder(path)
        self.operations.append(("create", path, None))

    def write_tensors(self, path, tensors):
        super().write_tensors(path, tensors)
        self.operations.append(("create", path, path.read_bytes()))

    def write_text(self, path, text):
        super().write_text(path, text)
        self.operations.append(("create", path, path.read_bytes()))

    def sync(self, path):
        super().sync(path)
        self.operations.append(("sync", path))

    def rename(self, old, new):
        super().rename(old, new)
        self.operations.append(("rename", old, new))

    def unlink(self, path):
        super().unlink(path)
        self.operations.append(("remove", path))

    def remove_folder(self, path):
        super().remove_folder(path)
        self.operations.append(("remove", path))


class FailingDisk(Disk):
    """Refuses operation number `at`, after half of the bytes if it is a write."""

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code, self.count = at, code, 0

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or name not in Disk.__dict__:
            return found

        def operation(path, *rest):
            self.count += 1
            if self.count - 1 == self.at:
                if name.startswith("write"):
                    found(path, *rest)
                    path.write_bytes(path.read_bytes()[:7])
                raise OSError(self.code, "refused", str(path))
            found(path, *rest)

        return operation


class SimulatedDisk:
    """Folders and files by number; what is durable, and which changes are not yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: dict[int, dict[str, int]] = {0: {}}  # As a running program sees them.
        self.contents: dict[int, bytes] = {}
        self.pending: list[Edit] = []
        for path in sorted(root.rglob("*")):
            self.apply(("create", path, path.read_bytes() if path.is_file() else None))
        self.pending = []
        self.durable_entries = {number: dict(names) for number, names in self.entries.items()}
        self.durable_contents = dict(self.contents)

    def _find(self, path: Path) -> int:
        number = 0
        for name in path.relative_to(self.root).parts:
            number = self.entries[number][name]
        return number

    def _change(self, folder: Path, changes: dict[str, int | None]) -> None:
        number = self._find(folder)
        self.pending.append(("entries", number, changes))
        _change_entries(self.entries[number], changes)

    def apply(self, operation: tuple) -> None:
        kind, path, *rest = operation
        if kind == "create":
            number = len(self.entries) + len(self.contents)
            self._change(path.parent, {path.name: number})
            if rest[0] is None:
                self.entries[number] = {}
            else:
                self.contents[number] = rest[0]
                self.pending.append(("content", number, rest[0]))
        elif kind == "rename":
            number = self._find(path)
            self._change(path.parent, {path.name: None, rest[0].name: number})
        elif kind == "remove":
            self._change(path.parent, {path.name: None})
        else:
            number = self._find(path)
            done = [edit for edit in self.pending if edit[1] == number]
            self.pending = [edit for edit in self.pending if edit[1] != number]
            _keep(done, self.durable_entries, self.durable_contents)

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """What may be found after a power cut now, as path -> content, None for a folder."""
        edits = self.pending
        for count in range(len(edits) + 1):
            yield self._state(edits[:count])
        for place, edit in enumerate(edits):
            yield self._state([edit])
            yield self._state(edits[:place] + edits[place + 1 :])
            if edit[0] == "content":
                assert isinstance(edit[2], bytes)
                for cut in (b"", edit[2][: len(edit[2]) // 2], bytes(len(edit[2]))):
                    yield self._state([*edits[:place], (*edit[:2], cut), *edits[place + 1 :]])

    def _state(self, kept: Iterable[Edit]) -> dict[str, bytes | None]:
        entries = {number: dict(names) for number, names in self.durable_entries.items()}
        contents = dict(self.durable_contents)
        _keep(kept, entries, contents)
        found: dict[str, bytes | None] = {}

        def walk(folder: int, prefix: str) -> None:
            for name, number in entries.get(folder, {}).items():
                is_folder = number in self.entries
                found[prefix + name] = None if is_folder else contents.get(number, b"")
                if is_folder:
                    walk(number, f"{prefix}{name}/")

        walk(0, "")
        return found


def _change_entries(names: dict[str, int], changes: dict[str, int | None]) -> None:
    for name, number in changes.items():
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _keep(
    edits: Iterable[Edit], entries: dict[int, dict[str, int]], contents: dict[int, bytes]
) -> None:
    for kind, number, value in edits:
        if kind == "content":
            assert isinstance(value, bytes)
            contents[number] = value
        else:
            assert isinstance(value, dict)
            _change_entries(entries.setdefault(number, {}), value)


def write_state(folder: Path, state: dict[str, bytes | None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def steps_that_load(folder: Path) -> tuple[int, int | None]:
    """The steps of the latest and the best checkpoint, which must hold exactly what was saved."""
    path = latest_checkpoint(folder)
    assert path is not None
    latest = checked(path)
    best, found = latest.state["best"]["step"], best_checkpoint(folder)
    assert (None if found is None else checked(found).step) == best
    return latest.step, best


def checked(path: Path) -> Checkpoint:
    found = load_checkpoint(path)
    expected = checkpoint(found.step, found.state["best"]["step"])
    assert found.state == {**expected.state, "step": found.step}
    assert found.tensors.keys() == expected.tensors.keys()
    for stem, tensors in expected.tensors.items():
        assert torch.equal(found.tensors[stem]["w"], tensors["w"])
    return found


def damage_newest(folder: Path) -> None:
    """A damaged checkpoint of the step that is saved next, and a partial one of a crash before."""
    shutil.copytree(folder / "step-00000001", folder / "step-00000002")
    (folder / "step-00000002/model.safetensors").write_bytes(b"damaged")
    shutil.copytree(folder / "step-00000001", folder / ".step-00000003.part")


# The best step before the save, and the one that the saved checkpoint names.
BEST = {
    (None, None): 500,  # At least so many different states of the disk are tried.
    (BEST_BEFORE, BEST_BEFORE): 300,
    (BEST_BEFORE, NEW): 400,
    (OLD, NEW): 500,
}


def prepare(folder: Path, keep_last: int, best: int | None, *, is_damaged: bool) -> None:
    """What lies in the folder before the save that is cut off."""
    steps = {0, OLD} if keep_last > 1 else {OLD}
    for step in sorted(steps | ({BEST_BEFORE} if best == BEST_BEFORE else set())):
        known = best if best is not None and step >= best else None
        save_checkpoint(folder, checkpoint(step, known), keep_last=keep_last)
    if is_damaged:
        damage_newest(folder)


def recorded_save(folder: Path, keep_last: int, best: tuple, *, is_damaged: bool):
    prepare(folder, keep_last, best[0], is_damaged=is_damaged)
    simulated, disk = SimulatedDisk(folder), RecordingDisk()
    save_checkpoint(folder, checkpoint(NEW, best[1]), keep_last=keep_last, disk=disk)
    return simulated, disk.operations


@pytest.mark.parametrize("best", BEST)
def test_every_crash_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, best):
    """And with it the best step that it names, intact."""
    seen: dict[str, tuple[int, int | None]] = {}
    before, after = (OLD, best[0]), (NEW, best[1])
    for keep_last, is_damaged in ((1, False), (2, False), (1, True), (2, True)):
        folder = tmp_path / f"{keep_last}{is_damaged}"
        simulated, operations = recorded_save(folder, keep_last, best, is_damaged=is_damaged)
        steps: list[set[tuple[int, int | None]]] = []
        for operation in (None, *operations):
            if operation is not None:
                simulated.apply(operation)
            steps.append(set())
            for state in simulated.states():
                digest = hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()
                if digest not in seen:
                    write_state(tmp_path / "crash", state)
                    seen[digest] = steps_that_load(tmp_path / "crash")
                steps[-1].add(seen[digest])
        assert steps[0] == {before}
        assert steps[-1] == {after}  # What is reported as saved survives a power cut.
        assert all(found <= {before, after} for found in steps)
        assert {before, after} in steps
    assert len(seen) >= BEST[best]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("best", [(None, None), (BEST_BEFORE, BEST_BEFORE), (BEST_BEFORE, NEW)])
def test_a_disk_that_refuses_any_operation_loses_nothing(tmp_path, code, is_damaged, best):
    _, operations = recorded_save(tmp_path / "whole", 1, best, is_damaged=is_damaged)
    before, after = (OLD, best[0]), (NEW, best[1])
    outcomes = set()
    for at in range(len(operations)):
        folder = tmp_path / str(at)
        prepare(folder, 1, best[0], is_damaged=is_damaged)
        try:
            disk = FailingDisk(at, code)
            save_checkpoint(folder, checkpoint(NEW, best[1]), keep_last=1, disk=disk)
            is_saved = True
        except CheckpointError:
            is_saved = False
        found = steps_that_load(folder)
        assert found == after if is_saved else found in (before, after)
        outcomes.add((is_saved, found))
        save_checkpoint(folder, checkpoint(4, best[1]), keep_last=1)  # The disk is well again.
        kept = {path.name for path in folder.iterdir()} - {f"step-0000000{best[1]}"}
        assert kept == {"step-00000004"}
    assert {(False, before), (True, after)} <= outcomes


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    save_checkpoint(tmp_path, checkpoint(3), keep_last=1)
    (tmp_path / "step-00000003/model.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, checkpoint(NEW), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_intact_checkpoint_of_the_same_step_stays(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(NEW), keep_last=1)
    disk = RecordingDisk()
    assert save_checkpoint(tmp_path, checkpoint(NEW), keep_last=1, disk=disk) == path
    assert disk.operations == []
