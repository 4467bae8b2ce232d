"""Validation of real shards, whole and broken: every fault by name, everything else still good."""

import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from multimodal_dlm.datasets.manifest import Manifest, open_manifest
from multimodal_dlm.datasets.validation import Validation, validate_manifest
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
        ("shapes-002.png", b"X", "a picture must be PNG"),
        ("shapes-002.json", b"X", "must be JSON"),
        ("shapes-002.txt", b"X", "`.txt` must be the first caption"),
    ],
)
def test_one_wrong_byte_costs_one_sample(tmp_path, member, byte, message):
    manifest = toy_mixture(tmp_path)
    shard = first_shard(tmp_path)
    data = bytearray(shard.read_bytes())
    data[place(shard, member)[0]] = byte[0]
    shard.write_bytes(data)
    found = check(manifest)
    assert not found.is_valid
    assert found.counts == {"digest": 1, "sample": 1}
    assert found.num_good == TOTAL - 1
    wrong = next(finding for finding in found.findings if finding.reason == "sample")
    assert message in wrong.message
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


@pytest.mark.parametrize("spoil", [cut, remove, replace_by_text, lie_in_the_index])
def test_an_unreadable_shard_costs_its_own_samples_only(tmp_path, spoil):
    manifest = toy_mixture(tmp_path)
    spoil(first_shard(tmp_path))
    found = check(manifest)
    assert found.num_good == TOTAL - 4
    assert found.counts["shard"] == 1
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


def test_a_held_out_picture_that_was_trained_on_is_a_warning(tmp_path):
    path = write_toy(tmp_path, "shapes")
    content = yaml.safe_load(path.read_text())
    content["splits"]["test"] = [content["splits"]["train"][1]]
    path.write_text(yaml.safe_dump(content))
    found = check(open_manifest(path))
    assert found.is_valid
    assert found.counts == {"same_picture": 4}
    assert toy_sample("shapes", 4).key in found.findings[0].message


def test_the_committed_sample_is_good(tmp_path):
    shutil.copytree(REPOSITORY / "datasets" / "sample", tmp_path / "sample")
    shutil.copy(REPOSITORY / "datasets" / "sample.yaml", tmp_path)
    found = check(open_manifest(tmp_path / "sample.yaml"))
    assert found.is_valid
    assert found.num_good == found.num_samples > 400
