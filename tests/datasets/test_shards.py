"""Shards: deterministic bytes, random access, other readers, hostile input."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml

from multimodal_dlm.datasets import ShardReader, iterate_samples, open_manifest
from multimodal_dlm.datasets.indexing import build_index, index_path, read_index
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.datasets.writing import image_extension, write_shards
from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import decode_image, encode_png
from tests.datasets.toy import SIZES, toy_sample, write_toy


def reader_of(root: Path, source: str = "shapes") -> ShardReader:
    opened = open_manifest(write_toy(root, source))
    return ShardReader(opened.sources[source].splits["train"], source=source)


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first = write_toy(tmp_path / "one", "shapes").read_text()
    assert first == write_toy(tmp_path / "two", "shapes").read_text()
    shard = tmp_path / "one/shapes/shapes-train-000000.tar"
    with tarfile.open(shard) as tar:
        assert {m.mtime for m in tar} == {0}
        assert tar.getnames()[:3] == ["shapes-000.png", "shapes-000.json", "shapes-000.txt"]


def test_every_sample_is_one_seek_away(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    assert len(reader) == SIZES["shapes"]
    for index in (24, 0, 13, 3, 4):
        sample = reader[index]
        assert (sample.key, sample.index, sample.source) == (f"shapes-{index:03d}", index, "shapes")
        assert sample.image.shape == (8, 8, 3)
        assert np.all(sample.image == index)
        assert reader.record(index).captions[0] == f"shapes {index}"
    with pytest.raises(IndexError, match="0 to 24; got 25"):
        reader[25]
    assert [reader.check(index).key for index in range(len(reader))][-1] == "shapes-024"


def test_text_only_samples_have_no_picture(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, "words")
    assert reader[2].image_bytes is None
    with pytest.raises(DataError, match="words-train-000000.tar, key words-002 has no picture"):
        _ = reader[2].image
    assert reader.check(2).image_bytes is None


def test_plain_webdataset_reads_our_shards(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    paths = [str(shard.path) for shard in reader.shards]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in reader]
    for ours, other in zip(reader, theirs, strict=True):
        assert other["png"] == ours.image_bytes
        assert other["txt"].decode() == ours.record.captions[0]
        assert json.loads(other["json"])["key"] == ours.key


def test_we_read_shards_webdataset_wrote(tmp_path: Path) -> None:
    sample = toy_sample("shapes", 5)
    path = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(path)) as writer:
        content = {"png": sample.image_bytes, "json": sample.record.to_json(), "txt": b"shapes 5"}
        writer.write({"__key__": sample.key, **content})
    (entry,) = build_index(path)
    assert entry.key == "shapes-005"
    assert set(entry.members) == {"png", "json", "txt"}


def test_a_missing_or_stale_index_is_replaced_by_scanning(tmp_path: Path) -> None:
    shard = reader_of(tmp_path).shards[0].path
    expected = read_index(shard)
    path = index_path(shard)
    path.write_text(path.read_text().replace(str(shard.stat().st_size), "1"))
    assert read_index(shard) == expected
    path.unlink()
    assert read_index(shard) == expected
    path.write_text("[]")
    with pytest.raises(DataError, match="Delete it"):
        read_index(shard)


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    shard = reader_of(tmp_path).shards[0].path
    content = json.loads(index_path(shard).read_text())
    content["samples"][0][1]["png"] = [10**9, 5]
    index_path(shard).write_text(json.dumps(content))
    with pytest.raises(DataError, match="must lie inside the file"):
        read_index(shard)


def member(name: str, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("/etc/passwd.json"), "key.extension"),
        (member("../up.json"), "key.extension"),
        (member("folder/a.json"), "key.extension"),
        (member("UPPER.json"), "key.extension"),
        (member("a.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "regular files"),
        (member("a.json", type=tarfile.LNKTYPE, linkname="b.json"), "regular files"),
        (member("a.json", type=tarfile.FIFOTYPE), "regular files"),
        (member("a", type=tarfile.DIRTYPE), "regular files"),
        (member("a.pickle"), "extension must be one of"),
        (member("a.tar.gz"), "extension must be one of"),
        (member("a.png"), "must have 1 to"),
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, info: tarfile.TarInfo, message: str) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match=message):
        build_index(path)


def test_a_member_twice_a_cut_tar_and_a_packed_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(member("a.json", size=2), io.BytesIO(b"{}"))
    with pytest.raises(DataError, match="key a: `.json` occurs twice"):
        build_index(path)
    shard = reader_of(tmp_path).shards[0].path
    shard.write_bytes(shard.read_bytes()[:1700])
    with pytest.raises(DataError, match="readable, uncompressed tar"):
        build_index(shard)
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.addfile(member("a.json"))
    with pytest.raises(DataError, match="readable, uncompressed tar"):
        build_index(packed)


@pytest.mark.parametrize("name", ["pipe:cat x", "../x.tar", "/x.tar", "a/b.tar", "http://x/y.tar"])
def test_manifests_name_plain_files_only(tmp_path: Path, name: str) -> None:
    path = write_toy(tmp_path, "shapes")
    content = yaml.safe_load(path.read_text())
    content["splits"]["train"][0]["name"] = name
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match="plain file name inside `folder`"):
        open_manifest(path)


def test_manifest_mistakes_are_named(tmp_path: Path) -> None:
    path = write_toy(tmp_path, "shapes")
    content = yaml.safe_load(path.read_text())
    for change, message in (
        ({"folder": "../elsewhere"}, "`folder` must lie inside the data root"),
        ({"weight": 0.5}, "`weight` must be an integer of at least 1; got 0.5"),
        ({"tasks": {"vqa": -1}}, "`tasks.vqa` must be an integer of at least 0; got -1"),
        ({"splitz": {}}, "Unknown entry `splitz`. Did you mean `splits`?"),
        ({"folder": 3}, "`folder` must lie inside the data root; got `3`"),
        ({"tasks": ["vqa"]}, r"`tasks` must be a mapping; got \['vqa'\]"),
        ({"tasks": {"vqaa": 1}}, "`tasks`: Unknown task `vqaa`. Did you mean `vqa`?"),
        ({"caption_weights": [1]}, r"`caption_weights` must be a mapping; got \[1\]"),
        ({"caption_weights": {"captions": [1]}}, "Unknown task `captions`. Did you mean `capt"),
        ({"caption_weights": {"caption": 1}}, "`caption_weights.caption` must be a list .* got 1"),
        ({"caption_weights": {"caption": [0, 0]}}, r"one of them above 0; got \[0, 0\]"),
        ({"caption_weights": {"caption": ["a"]}}, r"a list of numbers of at least 0.* got \['a'\]"),
        ({"splits": {"train": None}}, "`splits.train` must be a list of shards; got None"),
        ({"splits": {"train": ["x.tar"]}}, r"must be a list of shards; got \['x.tar'\]"),
    ):
        path.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(DataError, match=message):
            open_manifest(path)
    most = content["splits"]["train"][0]["num_bytes"] // 512
    for entry, value in (("count", "abc"), ("count", -1), ("count", most + 1), ("count", 10**12),
                         ("count", True), ("num_bytes", None), ("num_bytes", 1e3)):  # fmt: skip
        row = {**content["splits"]["train"][0], entry: value}
        path.write_text(yaml.safe_dump({**content, "splits": {"train": [row]}}))
        limit = most if entry == "count" else "[0-9]+"
        with pytest.raises(DataError, match=rf"{entry}` must be an integer in 0\.\.{limit}; got"):
            open_manifest(path)
    with pytest.raises(DataError, match="does not exist"):
        open_manifest(tmp_path / "none.yaml")


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    shard = reader.shards[0].path
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256 of shard"):
        reader.check_digest(0)
    shard.write_bytes(data + b"more")
    with pytest.raises(DataError, match="must have .* bytes; got"):
        ShardReader(reader.shards)[0]
    shutil.rmtree(shard.parent)
    with pytest.raises(DataError, match="does not exist. Build it"):
        ShardReader(reader.shards)[0]


def test_the_text_member_must_be_the_first_caption(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    shard = reader.shards[0].path
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        offset = tar.getmember("shapes-002.txt").offset_data
    shard.write_bytes(data[:offset] + b"X" + data[offset + 1 :])
    with pytest.raises(DataError, match="key shapes-002: `.txt` must have the checksum"):
        reader.check(2)
    index_path(shard).unlink()
    with pytest.raises(DataError, match="key shapes-002: `.txt` must be the first caption"):
        ShardReader(reader.shards).check(2)


def test_unknown_splits_list_those_there_are(tmp_path: Path) -> None:
    manifest = open_manifest(write_toy(tmp_path, "shapes"))
    assert manifest.splits == ("train",)
    assert len(list(iterate_samples(manifest, "train"))) == SIZES["shapes"]
    with pytest.raises(DataError, match="split `test`. Available: `train`"):
        list(iterate_samples(manifest, "test"))


@pytest.mark.parametrize(
    "broken",
    [b"", b"[]", b"{", b'{"key": "a"}', b'{"key": 3, "source": "s"}', b"[" * 100_000],
)
def test_broken_records_name_their_place(broken: bytes) -> None:
    with pytest.raises(DataError, match="record of shard 7"):
        Record.from_json(broken, "shard 7")


def test_records_round_trip_and_keep_their_rules() -> None:
    record = toy_sample("shapes", 1).record
    assert Record.from_json(record.to_json(), "here") == record
    from dataclasses import replace

    for change, message in (
        ({"key": "a.b"}, "`key` must be lower-case"),
        ({"captions": ()}, "`captions` must hold 1 to"),
        ({"captions": ("",)}, "texts must have 1 to"),
        ({"license": ""}, "`license` must be a text"),
    ):
        with pytest.raises(DataError, match=message):
            replace(record, **change).validate("here")


def huge_png(side: int) -> bytes:
    """A few bytes that claim side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def test_pictures_are_decoded_within_bounds_only() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(decode_image(encode_png(pixels), "here"), pixels)
    with pytest.raises(DataError, match="here: a picture must have at most .* pixels"):
        decode_image(huge_png(5000), "here")
    with pytest.raises(DataError, match="here: a picture must be PNG"):
        decode_image(huge_png(60_000), "here")
    for data in (b"GIF89a" + bytes(40), b"%PDF-1.4", b"", encode_png(pixels)[:40]):
        with pytest.raises(DataError, match="here: a picture must be PNG"):
            decode_image(data, "here")
    with pytest.raises(DataError, match="must be PNG, JPEG or WebP"):
        image_extension(b"GIF89a")


def test_writing_refuses_bad_samples(tmp_path: Path) -> None:
    sample = toy_sample("shapes", 1)
    with pytest.raises(DataError, match="`shard_size` must be at least 1"):
        write_shards([sample], tmp_path, "x", 0)
    with pytest.raises(DataError, match="PNG, JPEG or WebP"):
        write_shards([Sample(sample.record, b"text")], tmp_path, "x")
