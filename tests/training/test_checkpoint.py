"""Checkpoints: complete or absent, verified, pruned."""

import json

import pytest
import torch

from multimodal_dlm.errors import CheckpointError
from multimodal_dlm.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.arange(4.0) + step}}, {"loader": {"next": step}})


def test_what_is_saved_is_read_back(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep_last=2)
    read = load_checkpoint(path)
    assert read.step == 7
    assert read.state["loader"] == {"next": 7}
    assert torch.equal(read.tensors["model"]["w"], torch.arange(4.0) + 7)


def test_the_oldest_are_removed_and_no_partial_folder_is_left(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step), keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_one_changed_byte_is_refused(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint(1), keep_last=3)
    path = save_checkpoint(tmp_path, checkpoint(2), keep_last=3)
    content = bytearray((path / name).read_bytes())
    content[-2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}` changed since it was written. Delete"):
        load_checkpoint(path)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"


def test_a_missing_or_extra_file_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep_last=1)
    (path / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"\['extra.json'\] differ"):
        load_checkpoint(path)
    (path / "extra.json").unlink()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"\['model.safetensors'\] differ"):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path) is None


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "step-00000003")
    (tmp_path / "step-00000003" / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "step-00000003")


def test_a_crash_while_writing_leaves_the_old_ones(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep_last=2)
    broken = Checkpoint(2, {"model": {"w": torch.ones(2)}}, {"bad": object()})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, broken, keep_last=2)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
    save_checkpoint(tmp_path, checkpoint(2), keep_last=2)
    assert len(list(tmp_path.iterdir())) == 2
