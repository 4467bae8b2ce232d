"""Validation of real shards, whole and broken: every fault by name, everything else still good."""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from multimodal_dlm.datasets.manifest import Manifest, open_manifest
from multimodal_dlm.datasets.validation import Validation, validate_manifest
from multimodal_dlm.datasets.writing import write_shards
from multimodal_dlm.intake import encode_png
from tests.conftest import REPOSITORY
from tests.datasets.toy import SIZES, toy_mixture, toy_sample, write_toy

TOTAL = sum(SIZES.values())


def first_shard(root: Path) -> Path:
    return root / "shapes" / "shapes-train-000000.tar"


def place(shard: Path, member: str) -> tuple[int, int]:
    with tarfile.open(shard) as tar:
        found = tar.getmember(member)
    return found.offset_data, found.size


def check(manifest: Manifest) -> Validation:
    seen = []
    found = validate_manifest(manifest, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (found.num_samples, found.num_samples)
    return found


def test_good_shards_have_no_findings(tmp_path):
    found = check(toy_mixture(tmp_path))
    assert (found.num_good, found.num_samples, found.findings) == (TOTAL, TOTAL, [])
    assert found.is_valid


@pytest.mark.parametrize(
    ("member", "byte", "message"),
    [
        ("shapes-002.png", b"X", "picture"),
        ("shapes-002.json", b"X", "record"),
        ("shapes-002.txt", b"X", "text"),
    ],
)
@pytest.mark.parametrize("has_index", [True, False])
def test_one_wrong_byte_costs_one_sample(tmp_path, member, byte, message, has_index):
    manifest = toy_mixture(tmp_path)
    shard = first_shard(tmp_path)
    data = bytearray(shard.read_bytes())
    data[place(shard, member)[0]] = byte[0]
    shard.write_bytes(data)
    reason = "checksum" if has_index else message
    if not has_index:
        shard.with_name(shard.name + ".index.json").unlink()
    found = check(manifest)
    assert not found.is_valid
    assert found.counts == {"digest": 1, reason: 1}
    assert found.num_good == TOTAL - 1
    wrong = next(finding for finding in found.findings if finding.reason == reason)
    assert "shapes-002" in wrong.message
    assert (wrong.source, wrong.split) == ("shapes", "train")


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:2000])


def remove(shard: Path) -> None:
    shard.unlink()


def replace_by_text(shard: Path) -> None:
    shard.write_bytes(
        b"not a tar" * (shard.stat().st_size // 9) + b"x" * (shard.stat().st_size % 9)
    )
    shard.with_name(shard.name + ".index.json").unlink()


def lie_in_the_index(shard: Path) -> None:
    index = shard.with_name(shard.name + ".index.json")
    index.write_text(index.read_text().replace("shapes-000", "shapes-00x"))


@pytest.mark.parametrize(
    ("spoil", "reason", "num_lost"),
    [
        (cut, "shard_size", 4),
        (remove, "missing_shard", 4),
        (replace_by_text, "damaged_tar", 4),
        (lie_in_the_index, "index", 1),
    ],
)
def test_an_unreadable_shard_costs_its_own_samples_only(tmp_path, spoil, reason, num_lost):
    manifest = toy_mixture(tmp_path)
    spoil(first_shard(tmp_path))
    found = check(manifest)
    assert found.num_good == TOTAL - num_lost
    assert reason in found.counts
    assert not found.is_valid


def test_a_key_may_be_there_once(tmp_path):
    manifest = open_manifest(write_toy(tmp_path, "shapes"))
    path = tmp_path / "shapes.yaml"
    content = yaml.safe_load(path.read_text())
    content["splits"]["train"].append(content["splits"]["train"][0])
    path.write_text(yaml.safe_dump(content))
    found = check(open_manifest(path))
    assert found.counts == {"duplicate_key": 4}
    assert found.num_good == len(range(manifest.sources["shapes"].count("train")))


def with_test_split(root: Path, change) -> Manifest:
    """The toy shapes with one more sample in split `test`."""
    path = write_toy(root, "shapes")
    sample = toy_sample("shapes", 4)
    (info,) = write_shards([change(sample)], root / "shapes", "shapes-test")
    content = yaml.safe_load(path.read_text())
    content["splits"]["test"] = [vars(info)]
    path.write_text(yaml.safe_dump(content))
    return open_manifest(path)


def test_a_held_out_picture_that_was_trained_on_is_a_warning(tmp_path):
    def copy(sample):
        return replace(sample, record=replace(sample.record, key="new", split="test"))

    found = check(with_test_split(tmp_path, copy))
    assert found.is_valid
    assert found.counts == {"same_picture": 1}
    assert toy_sample("shapes", 4).key in found.findings[0].message


def test_leaks_and_wrong_labels_are_named(tmp_path):
    def change(**entries):
        return lambda sample: replace(sample, record=replace(sample.record, **entries))

    for number, (entries, reason) in enumerate(
        (
            ({"split": "test"}, "leaked_key"),
            ({"key": "new"}, "split"),
            ({"key": "new", "split": "test", "source": "other"}, "source"),
        )
    ):
        found = check(with_test_split(tmp_path / str(number), change(**entries)))
        assert found.counts == {reason: 1, "same_picture": 1}
        assert not found.is_valid


def test_pictures_of_two_sizes_are_a_warning(tmp_path):
    def enlarge(sample):
        record = replace(sample.record, key="new", split="test")
        return replace(sample, record=record, image_bytes=encode_png(np.ones((9, 7, 3), np.uint8)))

    found = check(with_test_split(tmp_path, enlarge))
    assert found.is_valid
    assert found.counts == {"mixed_sizes": 1}
    assert "7 x 9" in found.findings[0].message


def test_the_committed_sample_is_good(tmp_path):
    shutil.copytree(REPOSITORY / "datasets" / "sample", tmp_path / "sample")
    shutil.copy(REPOSITORY / "datasets" / "sample.yaml", tmp_path)
    found = check(open_manifest(tmp_path / "sample.yaml"))
    assert found.is_valid
    assert found.num_good == found.num_samples > 400
