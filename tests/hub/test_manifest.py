"""Hashes of saved folders: every change is found."""

import random
import shutil
import subprocess

import pytest

from multimodal_dlm.errors import CheckpointError
from multimodal_dlm.pipelines.manifest import (
    MANIFEST_NAME,
    read_manifest,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "part" / "weights.safetensors").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "README.md").write_text("a card")
    write_manifest(tmp_path)
    return tmp_path


def test_untouched_folder_passes(folder):
    assert verify_manifest(folder)
    assert set(read_manifest(folder)) == {"model_index.json", "part/weights.safetensors"}


def test_a_manifest_lists_what_is_shared(folder):
    for name in ("sample.png", ".env", "run.log", ".git/config.json", "notes.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("[]")
    assert verify_manifest(folder)
    write_manifest(folder)
    assert set(read_manifest(folder)) == {
        "model_index.json",
        "notes.md",
        "part/weights.safetensors",
    }
    assert verify_manifest(folder)


def test_folder_without_manifest_is_not_an_error(tmp_path):
    assert not verify_manifest(tmp_path)


def test_card_may_be_edited(folder):
    (folder / "README.md").write_text("another card")
    assert verify_manifest(folder)


def test_every_flipped_bit_is_found(folder):
    path = folder / "part" / "weights.safetensors"
    content = path.read_bytes()
    positions = random.Random(0).sample(range(len(content) * 8), 100)
    for position in positions:
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="weights.safetensors.* has changed"):
            verify_manifest(folder)


def test_truncated_missing_and_added_files_are_found(folder):
    path = folder / "part" / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="has changed"):
        verify_manifest(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="misses `part/weights.safetensors`"):
        verify_manifest(folder)
    path.write_bytes(content)
    (folder / "part" / "more.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="does not list. Remove it"):
        verify_manifest(folder)


@pytest.mark.parametrize("line", ["abc  name", "0" * 64 + "  ../x", "0" * 64 + "  /x", "0" * 64])
def test_damaged_manifests_are_refused(folder, line):
    (folder / MANIFEST_NAME).write_text(line + "\n")
    with pytest.raises(CheckpointError, match="line 1 must be"):
        verify_manifest(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs the command sha256sum")
def test_the_usual_command_checks_it_too(folder):
    result = subprocess.run(
        ["sha256sum", "-c", MANIFEST_NAME], cwd=folder, capture_output=True, check=False
    )
    assert result.returncode == 0
