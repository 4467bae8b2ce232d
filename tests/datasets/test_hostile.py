"""Hostile shards and samples: none breaks the reader, each has a name, good ones come through."""

import hashlib
import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal_dlm.datasets.indexing import build_index, write_index
from multimodal_dlm.datasets.manifest import Manifest, ShardFile, Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import decode_image, encode_png
from tests.datasets.toy import toy_sample

Members = list[tuple[tarfile.TarInfo, bytes]]
GOOD = ("aa", "zz")


def parts(key: str, **changes: object) -> dict[str, bytes]:
    """Members of a good sample, some replaced; None leaves one out."""
    sample = toy_sample("shapes", 1)
    content = {**sample.record.to_dict(), "key": key}
    text = json.dumps(content).encode()
    members = {"png": encode_png(np.full((8, 8, 3), ord(key[0]), np.uint8)), "json": text}
    members["txt"] = b"shapes 1"
    return {name: data for name, data in (members | changes).items() if data is not None}


def info(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member, data


def sample_members(key: str, **changes: object) -> Members:
    return [info(f"{key}.{extension}", data) for extension, data in parts(key, **changes).items()]


def tar_of(
    members: Sequence[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def around(middle: Members) -> bytes:
    return tar_of([*sample_members(GOOD[0]), *middle, *sample_members(GOOD[1])])


def manifest_of(folder: Path, data: bytes, count: int) -> tuple[Manifest, ShardFile]:
    path = folder / "shapes-train-000000.tar"
    path.write_bytes(data)
    shard = ShardFile(path, count, len(data), hashlib.sha256(data).hexdigest())
    source = Source("shapes", 1, {"caption": 1}, {}, {"train": (shard,)}, {"license": "MIT"})
    return Manifest("shapes", {"shapes": source}), shard


def record(**changes: object) -> bytes:
    content = {**toy_sample("shapes", 1).record.to_dict(), "key": "mm"}
    return json.dumps({**content, **changes}).encode()


def picture(
    mode: str, size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: object
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (60 * n, 0, 0)) for n in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


PNG = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
BOMB = zlib.compress(bytes(64 * 2**20))
SAMPLES: dict[str, tuple[dict[str, object], str]] = {
    # Pictures.
    "cut_png": ({"png": PNG[:45]}, "picture"),
    "png_header_flipped": ({"png": flipped(PNG, 18)}, "picture"),
    "png_pixels_flipped": ({"png": flipped(PNG, 50)}, "picture"),
    "signature_alone": ({"png": PNG[:8]}, "picture"),
    "text_as_png": ({"png": b"hello"}, "picture"),
    "svg": ({"png": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "picture"),
    "pdf": ({"png": b"%PDF-1.4\n"}, "picture"),
    "eps": ({"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "picture"),
    "gif": ({"png": picture("P", kind="GIF")}, "picture"),
    "bmp": ({"png": picture("RGB", kind="BMP")}, "picture"),
    "tiff": ({"png": picture("RGB", kind="TIFF")}, "picture"),
    "ico": ({"png": picture("RGB", (16, 16), kind="ICO")}, "picture"),
    "16_bit": ({"png": picture("I;16")}, "picture"),
    "cmyk": ({"jpg": picture("CMYK", kind="JPEG"), "png": None}, "picture"),
    "apng": ({"png": animated("PNG")}, "picture"),
    "animated_webp": ({"webp": animated("WEBP"), "png": None}, "picture"),
    "cut_jpeg": ({"jpg": picture("RGB", (64, 64), "JPEG")[:300], "png": None}, "picture"),
    "cut_webp": ({"webp": picture("RGB", (64, 64), "WEBP")[:40], "png": None}, "picture"),
    "too_many_pixels": ({"png": png(5000, 5000)}, "picture"),
    "claims_60000_squared": ({"png": png(60_000, 60_000)}, "picture"),
    "claims_2_billion": ({"png": png(2**31 - 1, 2**31 - 1)}, "picture"),
    "no_width": ({"png": png(0, 8)}, "picture"),
    "text_bomb": ({"png": png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB))}, "picture"),
    "profile_bomb": ({"png": png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB))}, "picture"),
    "no_pixels": ({"png": png(8, 8)}, "picture"),
    "polyglot_zip": ({"png": b"PK\x03\x04" + PNG}, "picture"),
    # Records.
    "json_not_utf8": ({"json": record().replace(b"MIT", b"\xff\xfe")}, "record"),
    "json_utf16": ({"json": record().decode().encode("utf-16")}, "record"),
    "json_with_mark": ({"json": b"\xef\xbb\xbf" + record()}, "record"),
    "json_deep": ({"json": b"[" * 200_000}, "record"),
    "json_deep_meta": ({"json": b'{"meta":' * 50_000}, "record"),
    "json_nan": ({"json": record(meta={"x": float("nan")})}, "record"),
    "json_infinity": ({"json": record(meta={"x": float("inf")})}, "record"),
    "json_name_twice": ({"json": record()[:-1] + b', "key": "mm"}'}, "record"),
    "json_long_integer": ({"json": record(meta={}).replace(b"{}", b"9" * 10_000)}, "record"),
    "json_list": ({"json": b"[]"}, "record"),
    "json_text": ({"json": b'"x"'}, "record"),
    "json_cut": ({"json": record()[:40]}, "record"),
    "json_unknown_entry": ({"json": record(caption="x")}, "record"),
    "captions_a_text": ({"json": record(captions="abc")}, "record"),
    "captions_none": ({"json": record(captions=[])}, "record"),
    "captions_numbers": ({"json": record(captions=[1, 2])}, "record"),
    "captions_too_many": ({"json": record(captions=["a"] * 300)}, "record"),
    "caption_too_long": ({"json": record(captions=["a" * 5000])}, "record"),
    "caption_with_nul": ({"json": record(captions=["a\0b"])}, "record"),
    "caption_with_escape": ({"json": record(captions=["\x1b[2Ja"])}, "record"),
    "caption_half_pair": ({"json": record(captions=["\ud800"])}, "record"),
    "qa_a_mapping": ({"json": record(qa={"question": "a"})}, "record"),
    "qa_of_texts": ({"json": record(qa=["a"])}, "record"),
    "meta_a_list": ({"json": record(meta=[1])}, "record"),
    "key_with_folder": ({"json": record(key="../mm")}, "record"),
    "another_key": ({"json": record(key="other")}, "key"),
    "huge_record": ({"json": record(meta={"x": "a" * (5 * 2**20)})}, "record"),
    # Members.
    "another_text": ({"txt": b"something else"}, "text"),
    "text_not_utf8": ({"txt": b"\xff\xfe"}, "text"),
    "no_json": ({"json": None}, "missing_member"),
    "no_text": ({"txt": None}, "missing_member"),
    "empty_png": ({"png": b""}, "member_size"),
    "empty_json": ({"json": b""}, "member_size"),
    "wrong_split": ({"json": record(split="test")}, "split"),
    "wrong_source": ({"json": record(source="other")}, "source"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_hostile_sample_is_named_and_its_neighbours_come_through(tmp_path, name):
    changes, reason = SAMPLES[name]
    manifest, shard = manifest_of(tmp_path, around(sample_members("mm", **changes)), 3)
    found = validate_manifest(manifest)
    assert reason in found.counts
    assert "mm" in " ".join(finding.message for finding in found.findings)
    assert not found.is_valid
    check_good(shard, [0, 2])
    for finding in found.findings:  # Messages of a decoder may hold addresses and control codes.
        assert " at 0x" not in finding.message
        assert finding.message.isprintable()


def check_good(shard: ShardFile, places: Sequence[int]) -> None:
    """The good samples are delivered by a lenient reader; every other one is a named error."""
    reader = ShardReader([shard], is_lenient=True)
    good = {index for index in range(len(reader)) if not failed(lambda i=index: reader.check(i))}
    assert set(places) <= good
    for place, key in zip(places, GOOD, strict=True):
        assert reader[place].key == key
        assert (reader[place].image == ord(key[0])).all()


def failed(read: Callable[[], object]) -> bool:
    found = None
    try:
        read()
    except DataError as error:
        found = error
    if found is not None:
        assert found.reason != "data"
        assert len(str(found)) < 2000
    return found is not None


def raw_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with any size field."""
    member = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    member[124:136], member[156:157] = size, kind
    member[148:156] = b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    return bytes(member)


def spliced(middle: bytes) -> bytes:
    """Bytes between the members of two good samples."""
    first, last = tar_of(sample_members(GOOD[0])), tar_of(sample_members(GOOD[1]))
    end = sum(512 + -(-len(data) // 512) * 512 for data in parts(GOOD[0]).values())
    return first[:end] + middle + last


MEMBERS: dict[str, tuple[tarfile.TarInfo, str]] = {
    "absolute": (info("/etc/passwd.json")[0], "member_name"),
    "climbing": (info("../../up.json")[0], "member_name"),
    "folder_in_name": (info("a/b.json")[0], "member_name"),
    "backslash": (info("..\\up.json")[0], "member_name"),
    "upper_case": (info("UP.json")[0], "member_name"),
    "hidden": (info(".json")[0], "member_name"),
    "not_utf8": (info("m\udcff\udcfe.json")[0], "member_name"),
    "control_codes": (info("m\x1b[2J\n.json")[0], "member_name"),
    "nul_trick": (info("mm.png/../../x")[0], "member_name"),
    "long_gnu_name": (info("m" * 5000 + ".json")[0], "member_name"),
    "pickle": (info("mm.pickle")[0], "member_name"),
    "python": (info("mm.pyd")[0], "member_name"),
    "double_extension": (info("mm.json.gz")[0], "member_name"),
    "link": (info("mm.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")[0], "member_type"),
    "hard_link": (info("mm.json", type=tarfile.LNKTYPE, linkname="aa.json")[0], "member_type"),
    "device": (info("mm.json", type=tarfile.CHRTYPE, devmajor=1, devminor=3)[0], "member_type"),
    "block_device": (info("mm.json", type=tarfile.BLKTYPE)[0], "member_type"),
    "pipe": (info("mm.json", type=tarfile.FIFOTYPE)[0], "member_type"),
    "folder": (info("mm", type=tarfile.DIRTYPE)[0], "member_type"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_member_is_named_and_left_out(tmp_path, name):
    member, reason = MEMBERS[name]
    manifest, shard = manifest_of(tmp_path, around([(member, b"")]), 2)
    found = validate_manifest(manifest)
    assert reason in found.counts
    assert found.num_good == 2
    assert all(finding.message.isascii() for finding in found.findings)
    check_good(shard, [0, 1])
    with pytest.raises(DataError) as caught:  # Unless lenient the run stops, by rule.
        ShardReader([shard])[0]
    assert caught.value.reason == reason


def pax(text: bytes) -> bytes:
    padded = text + bytes(-len(text) % 512)
    return (
        raw_header("pax", b"%011o\0" % len(text), b"x")
        + padded
        + raw_header("mm.json", b"0" * 11 + b"\0")
    )


WHOLE = tar_of([*sample_members(GOOD[0]), *sample_members(GOOD[1])])
FILES: dict[str, tuple[bytes, int]] = {  # And how many good samples can still be told.
    "cut_in_a_member": (WHOLE[:1700], 0),
    "cut_between_samples": (spliced(b"")[:3072], 0),
    "no_end": (WHOLE.rstrip(b"\0") + b"\0" * 100, 1),
    "two_archives": (tar_of(sample_members(GOOD[0])) + tar_of(sample_members(GOOD[1])), 1),
    "hidden_bytes": (tar_of(sample_members(GOOD[0])) + bytes(2**16) + b"x", 1),
    "empty": (b"", 0),
    "zeros": (bytes(10240), 0),
    "noise": (np.random.default_rng(0).bytes(10240), 0),
    "gzip": (b"\x1f\x8b\x08" + bytes(2000), 0),
    "flipped_header": (flipped(WHOLE, 3), 0),
    "negative_size": (spliced(raw_header("mm.json", b"\xff" * 12)), 1),
    "huge_size": (spliced(raw_header("mm.json", b"\x80" + b"\x7f" * 11)), 1),
    "size_of_words": (spliced(raw_header("mm.json", b"abcdefghijk\0")), 1),
    "pax_back_to_start": (spliced(pax(b"15 size=-4096\n")), 1),
    "pax_huge_size": (spliced(pax(b"26 size=9999999999999999\n")), 1),
    "pax_no_length": (spliced(pax(b"abc path=x\n")), 1),
    "pax_endless": (spliced(pax(b"9999 path=x\n")), 1),
    "pax_climbing": (spliced(pax(b"21 path=../../mm.js\n")), 1),
    "gnu_name_of_8_eb": (spliced(raw_header("././@LongLink", b"\x80" + b"\x7f" * 11, b"L")), 1),
    "gnu_name_negative": (spliced(raw_header("././@LongLink", b"\xff" * 12, b"L")), 1),
    "many_pax_headers": (spliced(raw_header("pax", b"0" * 11 + b"\0", b"x") * 3000), 1),
    "sparse": (spliced(raw_header("mm.json", b"0" * 11 + b"\0", b"S")), 1),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_named_and_what_can_be_told_is_read(tmp_path, name):
    data, num_good = FILES[name]
    manifest, shard = manifest_of(tmp_path, data, 2)
    found = validate_manifest(manifest)
    assert not found.is_valid
    assert found.num_good >= num_good
    assert {"digest", "data"}.isdisjoint(found.counts)
    reader = ShardReader([shard], is_lenient=True)
    good = [index for index in range(2) if not failed(lambda i=index: reader.check(i))]
    assert len(good) == found.num_good
    with pytest.raises(DataError):
        ShardReader([shard])[0]


def test_pixels_beyond_the_header_are_never_unpacked():
    """64 MB of zeros in the data of an 8 x 8 picture: its 200 bytes are read, the rest is not."""
    tracemalloc.start()
    pixels = decode_image(png(8, 8, chunk(b"IDAT", BOMB)), "here")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (8, 8, 3)
    assert peak < 2**20


def test_there_are_many_cases():
    assert len(SAMPLES) + len(MEMBERS) + len(FILES) >= 100


INDEXES = [
    b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"format": "other"}',
    b'{"format": "multimodal_dlm.shard_index/1", "num_bytes": 1, "samples": 3}',
    b'{"format": "multimodal_dlm.shard_index/1", "num_bytes": SIZE, "samples": [["aa", 3]]}',
    b'{"format": "multimodal_dlm.shard_index/1", "num_bytes": SIZE, "samples": [[1, {"png": []}]]}',
    b'{"format": "multimodal_dlm.shard_index/1", "num_bytes": SIZE, "samples":'
    b' [["aa", {"json": [-5, 9], "txt": [0, 1]}], ["zz", {"json": [0, 1e400], "txt": [0, 1]}]]}',
    b'{"format": "multimodal_dlm.shard_index/1", "num_bytes": SIZE, "samples":'
    b' [["aa", {"json": [9999999, 9], "txt": [0, 1]}], ["zz", {"json": [0, 9], "txt": [0, 1]}]]}',
]  # fmt: skip


@pytest.mark.parametrize("content", INDEXES, ids=range(len(INDEXES)))
def test_a_hostile_index_harms_no_sample_that_scanning_finds(tmp_path, content):
    _, shard = manifest_of(tmp_path, WHOLE, 2)
    path = shard.path.with_name(shard.path.name + ".index.json")
    path.write_bytes(content.replace(b"SIZE", str(len(WHOLE)).encode()))
    for is_lenient in (False, True):
        reader = ShardReader([shard], is_lenient=is_lenient)
        for index in range(2):
            if not failed(lambda i=index, r=reader: r.check(i)):
                assert reader[index].key == GOOD[index]


def test_a_shard_edited_after_indexing_is_noticed_when_it_is_read(tmp_path):
    _, shard = manifest_of(tmp_path, WHOLE, 2)
    index = build_index(shard.path)
    write_index(shard.path, index)
    offset, size = index[0].members["png"]
    other = encode_png(np.full((8, 8, 3), 7, np.uint8))
    assert len(other) <= size  # A good picture, but another one.
    edited = WHOLE[:offset] + other.ljust(size, b"\0") + WHOLE[offset + size :]
    shard.path.write_bytes(edited)
    reader = ShardReader([shard])
    with pytest.raises(DataError, match="checksum") as caught:
        reader[0]
    assert caught.value.reason == "checksum"
    assert reader[1].key == "zz"
