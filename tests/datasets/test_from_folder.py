"""Folders of pictures: every way to give captions, every hostile file, the same bytes twice."""

import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal_dlm.datasets import ShardReader, open_manifest
from multimodal_dlm.datasets.folder_rows import read_folder
from multimodal_dlm.datasets.from_folder import build_from_folder
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.errors import DataError, MultimodalDLMError


def picture(path: Path, colour=(200, 0, 0), size=(20, 10), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures without captions."""
    for number, name in enumerate(("a.png", "b.jpg", "sub/c.webp")):
        picture(tmp_path / "Pets!" / name, colour=(80 * number, 10, 10))
    return tmp_path / "Pets!"


def records(made) -> dict[str, list]:
    (source,) = open_manifest(made.manifest).sources.values()
    samples = [s for shards in source.splits.values() for s in ShardReader(shards)]
    return {s.record.meta["file_name"]: s for s in samples}


def refused(made) -> dict[str, str]:
    return {refusal.name: refusal.message for refusal in made.refused}


def build(folder: Path, **options):
    return build_from_folder(folder, folder.parent / "data", **{"image_size": 16, **options})


JSONL = (
    '{"file_name": "a.png", "text": "a red cat"}\n\n{"file_name": "b.jpg", "text": "b"}\n'
    '{"file_name": "./sub/c.webp", "captions": ["c", "see"], "qa": [{"question": "who?",'
    ' "answer": "c"}]}\n{"file_name": "a.png", "text": "one more", "question": "what?",'
    ' "answer": "a cat", "type": "name"}\n'
)
CSV = 'file_name,text,question,answer\na.png,"a red cat",,\nb.jpg,b,,\nsub/c.webp,c,who?,c\n'
MAPPING = {"a.png": "a red cat", "b.jpg": ["b", "bee"], "sub/c.webp": {"text": "c"}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", JSONL),
        ("metadata.csv", CSV),
        ("captions.csv", "﻿" + CSV.replace("file_name,text", "image,caption")),
        ("captions.json", json.dumps(MAPPING)),
        ("captions.json", json.dumps([{"file_name": n, "text": n} for n in MAPPING])),
        (None, ""),
    ],
)
def test_captions_come_from_a_file_or_from_beside(folder, name, text):
    if name is None:
        (folder / "a.txt").write_text("a red cat\n\nanother\n")
        (folder / "b.txt").write_text("b")
        (folder / "sub" / "c.json").write_text('{"text": "c", "question": "q", "answer": "x"}')
    else:
        (folder / name).write_text(text, encoding="utf-8")
    made = build(folder, license="CC-BY-4.0")
    assert made.refused == []
    found = records(made)
    assert sorted(found) == ["a.png", "b.jpg", "sub/c.webp"]
    assert found["a.png"].record.captions[0] in ("a red cat", "a.png")
    if name == "metadata.jsonl":
        assert found["a.png"].record.captions == ("a red cat", "one more")
        assert [(q.question, q.answer, q.type) for q in found["a.png"].record.qa] == [
            ("what?", "a cat", "name")
        ]
        assert found["sub/c.webp"].record.captions == ("c", "see")
    opened = open_manifest(made.manifest)
    assert validate_manifest(opened).is_valid
    assert list(opened.sources) == ["pets"]
    assert opened.sources["pets"].license == "CC-BY-4.0"
    assert {s.record.license for s in found.values()} == {"CC-BY-4.0"}
    assert "vqa" not in opened.sources["pets"].tasks
    assert "Licence: CC-BY-4.0" in made.card.read_text()


def test_lines_end_at_line_feeds_alone(folder):
    """JSON strings may hold the line separators of Unicode as they are."""
    odd = "one\u2028two\u2029three\x85four"
    row = json.dumps({"file_name": "a.png", "text": odd}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(f"{row}\r\n{row}\n".encode())
    rows, left_out = read_folder(folder)
    assert [row.captions for row in rows] == [[odd]]
    assert {refusal.reason for refusal in left_out} == {"text"}
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_bytes(f"{odd}\r\nanother\r\n".encode())
    assert read_folder(folder)[0][0].captions == [odd, "another"]


def test_every_picture_with_questions_makes_the_task(folder):
    rows = [{"file_name": n, "text": "x", "question": "q?", "answer": "a"} for n in MAPPING]
    (folder / "captions.json").write_text(json.dumps(rows))
    made = build(folder)
    assert made.num_with_questions == 3
    assert open_manifest(made.manifest).sources["pets"].tasks["vqa"] > 0


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_folder_gives_the_same_bytes_and_splits_stay(tmp_path):
    pets = tmp_path / "pets"
    draw = np.random.default_rng(0)
    for number in range(40):
        pixels = draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        pets.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(pets / f"{number}.png")
        (pets / f"{number}.txt").write_text(f"pet {number}")
    first = build_from_folder(pets, tmp_path / "one", val=0.2, test=0.2)
    again = build_from_folder(pets, tmp_path / "two", val=0.2, test=0.2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert set(first.splits) == {"train", "val", "test"}
    assert sum(first.splits.values()) == 40
    before = {name: s.record.split for name, s in records(again).items()}
    (pets / "copy.png").write_bytes((pets / "7.png").read_bytes())
    (pets / "copy.txt").write_text("a copy")
    (pets / "3.png").unlink()
    after = records(build_from_folder(pets, tmp_path / "two", val=0.2, test=0.2))
    assert after["copy.png"].record.split == before["7.png"]
    assert {n: s.record.split for n, s in after.items() if n != "copy.png"} == {
        n: split for n, split in before.items() if n != "3.png"
    }


def test_pictures_become_upright_squares_over_white(tmp_path):
    pets = tmp_path / "pets"
    pets.mkdir()
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255  # The middle square is white, the sides black.
    Image.fromarray(wide).save(pets / "wide.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(pets / "clear.png")
    turned = np.zeros((8, 8, 3), np.uint8)
    turned[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # Upside down.
    Image.fromarray(turned).save(pets / "turned.png", exif=exif)
    for name in ("wide", "clear", "turned"):
        (pets / f"{name}.txt").write_text(name)
    means = {}
    for fit in ("crop", "pad", "stretch"):
        found = records(build_from_folder(pets, tmp_path / fit, image_size=8, fit=fit))
        means[fit] = found["wide.png"].image.mean()
        assert found["clear.png"].image.min() == 255
        assert found["turned.png"].image[-1].min() == 255
        assert found["turned.png"].image[:-1].max() == 0
    assert means["crop"] > 250
    assert means["pad"] == pytest.approx(255 * 0.75, abs=12)
    assert means["stretch"] == pytest.approx(127, abs=12)


def png_of_size(width: int, height: int) -> bytes:
    """A small file that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def test_hostile_files_are_refused_by_name_and_the_rest_is_built(folder, tmp_path):
    secret = picture(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("a secret")
    png = io.BytesIO()
    Image.new("RGB", (30, 30)).save(png, "PNG")
    hostile = {
        "bomb.png": png_of_size(60000, 60000),
        "cut.png": png.getvalue()[:60],
        "text.png": b"no picture at all",
        "empty.jpg": b"",
        "page.webp": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "script.png": b"GIF89a" + b"\0" * 50,
    }
    for name, data in hostile.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("x")
    (folder / "link.png").symlink_to(secret)
    (folder / "link.txt").write_text("x")
    picture(folder / "leak.png")
    (folder / "leak.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(folder / "deep.png")
    (folder / "deep.txt").write_text("x")
    picture(folder / "bare.png")
    picture(folder / "long.png", colour=(1, 2, 3))
    (folder / "long.txt").write_text("x" * 5000)
    picture(folder / "latin.png")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "old.gif").write_bytes(b"GIF89a")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (folder / name).write_text("good")
    made = build(folder)
    assert sorted(records(made)) == ["a.png", "b.jpg", "sub/c.webp"]
    found = refused(made)
    expected = {*hostile, "link.png", "leak.png", "deep.png", "bare.png", "long.png", "latin.png"}
    assert set(found) == expected | {"leak.txt", "latin.txt", "old.gif"}
    assert "pixels; got 60000 x 60000" in found["bomb.png"] or "Bomb" in found["bomb.png"]
    assert "it is a link to elsewhere" in found["link.png"]
    assert "it is a link to elsewhere" in found["leak.txt"]
    assert "must have a caption" in found["leak.png"]
    assert "must be UTF-8" in found["latin.txt"]
    assert "8 bits a channel; got mode I;16" in found["deep.png"]
    assert "1 to 4096 characters" in found["long.png"]
    assert "got `.gif`. Convert it" in found["old.gif"]
    assert all("PNG, JPEG or WebP" in found[n] for n in ("text.png", "empty.jpg", "script.png"))
    assert "a secret" not in made.manifest.read_text() + json.dumps(found)
    assert validate_manifest(open_manifest(made.manifest)).is_valid


def test_rows_that_lie_are_refused_by_line(folder):
    lines = [
        {"file_name": "../secret.png", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        {"file_name": "none.png", "text": "x"},
        {"file_name": "metadata.jsonl", "text": "x"},
        {"text": "x"},
        {"file_name": "a.png", "text": 7},
        {"file_name": "a.png", "question": "q"},
        {"file_name": "a.png", "qa": {"q": "a"}},
        [1],
        {"file_name": "a.png", "text": "good"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n" + "[" * 100_000 + "\n{\n"
    (folder / "metadata.jsonl").write_text(text)
    rows, found = read_folder(folder)
    assert [row.name for row in rows] == ["a.png"]
    said = {refusal.name: refusal.message for refusal in found}
    for number, message in enumerate(
        ["without `..`", "without `..`", "There is no such file", "must end in .png",
         "must name its picture", "a text or a list of texts", "must have an `answer`",
         "`qa` must be a list", "got list"], start=1,
    ):  # fmt: skip
        assert message in said[f"metadata.jsonl, line {number}"]
    assert "RecursionError" in said["metadata.jsonl, line 11"]
    assert "must be JSON" in said["metadata.jsonl, line 12"]
    assert "must have a caption" in said["b.jpg"]
    assert len(found) == 11 + 2


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"metadata.csv": "x", "metadata.jsonl": "x"}, {}, "must have one metadata file"),
        ({"metadata.csv": "name;text\na.png;x"}, {}, "columns `file_name` and `text`; got `name;"),
        ({"captions.json": "{"}, {}, "captions.json must be JSON"),
        ({"captions.json": "7"}, {}, "must be a list of rows; got int"),
        ({"metadata.csv": b"file_name,text\na.png,\xff"}, {}, "must be UTF-8"),
        ({}, {}, "a usable picture for the training split; got none"),
        ({"a.txt": "a"}, {"image_size": 60}, "multiple of 8 up to 4096; got 60"),
        ({"a.txt": "a"}, {"fit": "corp"}, "Did you mean `crop`"),
        ({"a.txt": "a"}, {"val": 0.5, "test": 0.6}, "shares that leave some for training"),
        ({"a.txt": "a"}, {"license": " "}, "must be an SPDX expression"),
        ({"a.txt": "a"}, {"name": "My Pets"}, "`name` must be lower-case letters"),
    ],
)
def test_wrong_folders_and_options_are_sentences(folder, files, options, message):
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    with pytest.raises(MultimodalDLMError, match=message):
        build(folder, **options)
    assert not list((folder.parent / "data").glob("*.yaml"))


def test_nothing_of_a_user_is_replaced(folder):
    (folder / "a.txt").write_text("a")
    plain = folder.rename(folder.parent / "plain")
    for output, name in ((plain.parent, "plain"), (plain, "x"), (plain.parent.parent, None)):
        with pytest.raises(DataError, match="must not be written into the folder of the pictures"):
            build_from_folder(plain, output, name=name or plain.parent.name)
    folder = plain.rename(folder)
    other = folder.parent / "data"
    (other / "pets").mkdir(parents=True)
    (other / "pets" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="another dataset called `pets`, which is not replaced"):
        build(folder)
    assert (other / "pets" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(DataError, match="there is no"):
        build_from_folder(folder / "none", other)


def test_equal_names_get_keys_of_their_own(folder):
    picture(folder / "A.PNG", colour=(1, 1, 1))
    picture(folder / "猫.png", colour=(2, 2, 2))
    for name in ("a.txt", "A.txt", "猫.txt"):
        (folder / name).write_text("x")
    keys = sorted(sample.key for sample in records(build(folder)).values())
    assert len(set(keys)) == 3
    assert [key.rpartition("-")[0] for key in keys] == ["a", "a", "picture"]
