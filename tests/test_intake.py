"""Every picture from outside comes in through one module."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multimodal_dlm
from multimodal_dlm import intake
from multimodal_dlm.errors import DataError

PACKAGE = Path(multimodal_dlm.__file__).parent


def test_no_other_module_opens_pictures():
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    ]
    assert found == ["intake.py"]


def test_a_file_is_refused_by_its_bytes_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(intake.MAX_IMAGE_BYTES + 1)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(DataError, match="at most 33554432 bytes; got 33554433. Scale") as caught:
        intake.read_upright(path, where="mm")
    assert str(caught.value).startswith("mm: ")
    assert caught.value.reason == "picture"


def test_what_goes_wrong_while_reading_is_an_error_of_the_picture():
    png = intake.encode_png(np.zeros((4, 4, 3), np.uint8))
    assert intake.decode_picture(png, "here", lambda image: image.size) == (4, 4)

    def fail(image: Image.Image) -> None:
        raise ValueError("buffer at 0x7f00")

    with pytest.raises(intake.UnreadablePictureError, match="got ValueError. Save") as caught:
        intake.decode_picture(png, "here", fail)
    assert "0x7f00" not in str(caught.value)
    assert isinstance(caught.value, DataError)
