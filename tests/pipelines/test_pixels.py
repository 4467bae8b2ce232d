"""Pictures and masks in and out."""

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.intake import read_upright
from multimodal_dlm.pipelines.pixels import from_pixels, to_mask, to_pixels


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    pixels = to_pixels(image, 8)
    assert pixels[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert pixels[0, :, 4, 4].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    assert to_pixels(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), 8).shape == (
        1,
        3,
        8,
        8,
    )


def test_other_sizes_are_resized_and_stay_in_range():
    edges = torch.zeros(3, 40, 24)
    edges[:, ::2] = 1.0
    pixels = to_pixels([edges, edges[:, :8, :8]], 16)
    assert pixels.shape == (2, 3, 16, 16)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


def test_round_trip_through_pil_and_numpy():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = to_pixels(array, 8)
    assert np.array_equal(np.asarray(from_pixels(pixels, "pil")[0]), array)
    assert np.array_equal(to_pixels(from_pixels(pixels, "np"), 8), pixels)
    assert torch.equal(from_pixels(pixels, "pt"), pixels)


def test_any_covered_pixel_counts_in_a_smaller_mask():
    mask = torch.zeros(64, 64)
    mask[17, 33] = 1.0
    small = to_mask(mask, 16)
    assert small.sum() == 1
    assert small[0, 0, 4, 8]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "at least one picture"),
        ("apple.png", "got str. Open files with"),
        (torch.zeros(8, 8), "must have 3 channels"),
        (np.zeros((8, 8, 4), dtype=np.uint8), "must have 3 channels"),
        (np.full((8, 8, 3), 255.0), r"must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), -1.0), r"must lie in \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(ConfigError, match=message):
        to_pixels(image, 8)


@pytest.mark.parametrize("convert", [to_pixels, to_mask])
@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB"])
def test_modes_of_more_than_8_bits_are_refused(convert, mode):
    with pytest.raises(ConfigError, match=f"one of the modes 1, L, .*; got {mode}. Scale"):
        convert(Image.new(mode, (8, 8)), 8)


@pytest.mark.parametrize("convert", [to_pixels, to_mask])
def test_pil_images_are_turned_as_their_exif_says(convert, tmp_path):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # Bright above; a quarter turn makes it bright at the right.
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    for read in (Image.open, read_upright):
        found = convert(read(tmp_path / "turned.png"), 8)[0, 0].float()
        assert found[:, 4:].min() == 1
        assert found[:, :4].max() == 0
    image.info["exif"] = b"no exif"
    assert convert(image, 8)[0, 0, :4].float().min() == 1


@pytest.mark.parametrize("convert", [to_pixels, to_mask])
def test_a_pil_image_of_too_many_pixels_is_refused_unread(convert, monkeypatch, tmp_path):
    Image.new("L", (4097, 4096)).save(tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as image:
        monkeypatch.setattr(image, "load", lambda: pytest.fail("pixels were decoded"))
        with pytest.raises(ConfigError, match="at most 16777216 pixels; got 4097 x 4096. Scale"):
            convert(image, 8)
