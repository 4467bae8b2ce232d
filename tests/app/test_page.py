"""Uploads, HTML and what the page refuses; with gradio where it is installed."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal_dlm import intake
from multimodal_dlm.app import uploads
from multimodal_dlm.app.page import (
    BROKEN,
    _editor,
    _forgiving,
    _painted,
    build_page,
    launch_options,
    shown,
)
from multimodal_dlm.app.rendering import render_empty, render_frame, render_mistake
from multimodal_dlm.app.tasks import Frame, Studio
from multimodal_dlm.app.uploads import drawn_mask, open_upload
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline, read_recipe
from multimodal_dlm.pipelines.image_metadata import attach_recipe
from tests.pipelines.tiny import tiny_components


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_uploads_become_plain_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    found = open_upload(saved(tmp_path / "a.png", clear))
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 0, 0)
    assert found.getpixel((1, 1)) == (255, 255, 255)  # Transparency is white.
    turned = Image.new("RGB", (8, 4), "blue")
    exif = Image.Exif()
    exif[274] = 6  # A quarter turn.
    exif[270] = "where I live"
    found = open_upload(saved(tmp_path / "b.jpg", turned, exif=exif))
    assert found.size == (4, 8)
    assert found.info == {}
    assert len(found.getexif()) == 0
    assert max(open_upload(saved(tmp_path / "c.webp", Image.new("L", (2000, 10)))).size) == 512


def hostile(folder: Path) -> list[Path]:
    """Files that are no pictures, or of a format that is not let in."""
    files = [folder / "text.png", folder / "cut.png", folder / "page.svg", folder / "empty.png"]
    files[0].write_text("no picture at all")
    whole = saved(folder / "whole.png", Image.effect_noise((64, 64), 80)).read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    files[2].write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    files[3].write_bytes(b"")
    gif = saved(folder / "moving.gif", Image.new("P", (4, 4)))
    return [*files, saved(folder / "map.bmp", Image.new("RGB", (4, 4))), gif, BROKEN]


def test_bad_uploads_get_a_sentence_that_gives_nothing_away(tmp_path, monkeypatch):
    for path in hostile(tmp_path):
        with pytest.raises(DataError) as caught:
            open_upload(path)
        assert str(caught.value) == (
            "That file is not a readable picture. Choose a PNG, JPEG or WebP picture."
        )
        assert caught.value.__cause__ is None
    with pytest.raises(DataError, match="There is no picture yet"):
        open_upload(None)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = saved(tmp_path / "moving.webp", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="cannot be used: a picture must have one frame; got 2"):
        open_upload(moving)
    path = saved(tmp_path / "large.png", Image.new("RGB", (70, 70)))
    monkeypatch.setattr(intake, "MAX_IMAGE_PIXELS", 4096)
    with pytest.raises(DataError, match="cannot be used: .* at most 4096 pixels; got 70 x 70"):
        open_upload(path)
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(DataError, match="cannot be used: .* at most 10 bytes; got"):
        open_upload(path)


def test_the_mask_is_what_was_painted():
    layer = Image.new("RGBA", (6, 6))
    layer.paste((217, 72, 15, 255), (0, 0, 3, 6))
    mask = np.asarray(drawn_mask([layer, Image.new("RGBA", (6, 6))]))
    assert mask[:, :3].min() == 255
    assert mask[:, 3:].max() == 0
    for layers in ([], [Image.new("RGBA", (6, 6))]):
        with pytest.raises(DataError, match="Nothing is painted over yet"):
            drawn_mask(layers)
    drawing = {"background": Image.new("RGBA", (12, 12), "red"), "layers": [layer]}
    image, mask = _painted(drawing)
    assert image.size == mask.size == (6, 6)
    drawing = {"background": Image.new("RGBA", (12, 12), (0, 0, 0, 0)), "layers": [layer]}
    assert _painted(drawing)[0].getextrema() == ((255, 255),) * 3  # Transparency is white.
    for value in (None, {"background": None, "layers": []}, BROKEN):
        with pytest.raises(DataError, match="picture"):
            _painted(value)


def test_a_frame_shows_pictures_texts_and_steps(tmp_path):
    image = attach_recipe(Image.new("RGB", (4, 4), "red"), {"prompt": "a"})
    text = "a <b>red</b>[MASK] apple"
    html = render_frame(Frame((image,), (text,), (image, image), 3, 8, 1.25))
    assert "a &lt;b&gt;red&lt;/b&gt;" in html
    assert "<b>" not in html
    assert html.count('class="masked"') == 1
    assert html.count("<img") == 3
    assert "step 3 of 8, 1.2 s" in html
    final = render_frame(Frame((image,), is_final=True, step=8, num_forwards=16))
    assert "8 steps, 16 forward passes" in final
    found = re.search(r"base64,([^\"]+)", final)
    assert found is not None
    path = tmp_path / "kept.png"
    path.write_bytes(base64.b64decode(found[1]))
    assert read_recipe(path) == {"prompt": "a"}
    draft = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", html)[0])))
    assert draft.info == {}
    assert "&lt;script&gt;" in render_mistake("<script>")
    assert "&lt;" in render_empty("<")


def test_a_mistake_is_a_sentence_and_a_fault_of_ours_says_nothing_of_itself(caplog):
    def mistaken():
        raise ConfigError("`steps` must be more.")

    def broken():
        yield Frame(step=1)
        raise RuntimeError("/var/secret 0x7f00")

    [(html, picture)] = shown(mistaken)
    assert "`steps` must be more." in html
    assert picture is None
    *_, (html, _) = shown(broken)
    assert "not your mistake" in html
    assert "secret" not in html
    assert "Traceback" not in html
    assert "secret" in caplog.text  # The log of the server keeps it.


def test_other_machines_need_a_key():
    with pytest.raises(ConfigError, match="`key` must be given"):
        launch_options("0.0.0.0", None, None)


def test_the_page_is_closed_to_all_but_this_machine(tmp_path):
    pytest.importorskip("gradio", reason="needs the extra `ui`")
    options = launch_options("127.0.0.1", None, None)
    assert options["server_name"] == "127.0.0.1"
    assert options["share"] is False
    assert options["show_error"] is False
    assert options["allowed_paths"] == []
    assert launch_options("0.0.0.0", 7860, "word")["auth"] == ("demo", "word")
    page = build_page(Studio(UnifiedTextToImagePipeline(**tiny_components())), "tiny")
    config = page.get_config_file()
    assert page.analytics_enabled is False
    events = [each for each in config["dependencies"] if each["backend_fn"]]
    assert len(events) >= 6
    private = [each for each in events if each["api_visibility"] == "private"]
    # Examples only fill a field in.
    assert {each["id"] for each in events} - {each["id"] for each in private} <= {
        each["id"] for each in events if "load_example" in str(each["api_name"])
    }
    labels = {str(part["props"].get("label")) for part in config["components"]}
    assert {"Draw", "Read", "Invent", "Inpaint", "Steps", "Guidance", "Seed", "Scheduler"} <= labels


def test_what_gradio_cannot_open_reaches_our_own_reader():
    class Component:
        def preprocess(self, payload):
            raise OSError("cannot identify image file /tmp/secret")

    assert _forgiving(Component()).preprocess("x") == BROKEN


def test_the_editor_lets_in_what_the_other_tabs_do(tmp_path, monkeypatch):
    gr = pytest.importorskip("gradio", reason="needs the extra `ui`")
    from gradio.components.image_editor import EditorData, EditorDataBlobs
    from gradio.data_classes import FileData

    editor = _editor(gr)

    def drawn(background: Path, layer: Path):
        """The editor's value, by files and by the bytes that a browser sends."""
        yield editor.preprocess(
            EditorData(
                background=FileData(path=str(background)), layers=[FileData(path=str(layer))]
            )
        )
        editor.blob_storage["own"] = EditorDataBlobs(
            background=background.read_bytes(), layers=[layer.read_bytes()], composite=None
        )
        yield editor.preprocess(EditorData(id="own"))

    layer = saved(tmp_path / "layer.png", Image.new("RGBA", (6, 6), "red"))
    for value in drawn(saved(tmp_path / "a.webp", Image.new("RGB", (6, 6))), layer):
        assert _painted(value)[0].size == (6, 6)
    for path in hostile(tmp_path)[:-1]:
        for value in drawn(path, layer):
            with pytest.raises(DataError, match="not a readable picture"):
                _painted(value)
    monkeypatch.setattr(intake, "MAX_IMAGE_PIXELS", 36)
    for value in drawn(saved(tmp_path / "large.png", Image.new("RGB", (7, 6))), layer):
        with pytest.raises(DataError, match="cannot be used: .* at most 36 pixels; got 7 x 6"):
            _painted(value)
