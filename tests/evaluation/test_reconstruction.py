from types import SimpleNamespace

import pytest
import torch

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import reconstruction
from multimodal_dlm.evaluation.measures.reconstruction import (
    foreground,
    measure_reconstruction,
    peak_signal_to_noise,
)
from multimodal_dlm.pipelines.pixels import to_pixels
from tests.evaluation.toy import IMAGE_SIZE, write_squares


def test_psnr_against_hand_values():
    pixels = torch.full((2, 3, 4, 4), 0.5)
    other = pixels.clone()
    other[0] += 0.1
    other[1, :, 0, 0] += 0.4
    assert peak_signal_to_noise(pixels, other).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    weight = torch.zeros(2, 1, 4, 4)
    weight[:, :, 0, 0] = 1
    expected = [20.0, -20 * torch.tensor(0.4).log10().item()]
    assert peak_signal_to_noise(pixels, other, weight).tolist() == pytest.approx(expected, abs=1e-3)


def test_foreground_is_what_differs_from_the_corner():
    pixels = torch.full((1, 3, 4, 4), 0.9)
    pixels[0, 1, 2, 3] = 0.5
    pixels[0, 0, 1, 1] = 0.91
    assert foreground(pixels)[0, 0].nonzero().tolist() == [[2, 3]]


class Rounding:
    """Codes are which third of the brightness the mean of a picture falls into."""

    codebook_sizes = (3,)
    config = {"image_size": IMAGE_SIZE}

    def encode(self, pixels):
        return ((pixels.mean(dim=(1, 2, 3)) * 3).long().clamp(0, 2).view(-1, 1, 1),)

    def decode(self, codes):
        value = (codes[0].float() + 0.5) / 3
        return value.view(-1, 1, 1, 1).expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_known_tokenizer_is_measured(tmp_path):
    source = open_manifest(write_squares(tmp_path)).sources["squares"]
    pipe = SimpleNamespace(image_tokenizer=Rounding(), device=torch.device("cpu"))
    found = measure_reconstruction(pipe, HeldOut(source, "test", batch_size=2)).metrics
    assert (found["psnr"].n, found["codes_used.0"].n) == (3, 3)
    assert found["codes_used.0"].value == pytest.approx(1 / 3)
    assert found["perplexity.0"].value == pytest.approx(1.0)
    # A gray of its own for each picture is no better than its mean color.
    assert 10 < found["psnr"].value < found["psnr"].baselines["flat"] < 20
    assert found["foreground_psnr"].value < found["psnr"].value
    with pytest.raises(DataError, match="split `val`"):
        measure_reconstruction(pipe, HeldOut(source, "val"))


def test_a_picture_of_one_colour_has_no_foreground(tmp_path, monkeypatch):
    source = open_manifest(write_squares(tmp_path)).sources["squares"]
    pipe = SimpleNamespace(image_tokenizer=Rounding(), device=torch.device("cpu"))
    data = HeldOut(source, "test", batch_size=2)
    whole = measure_reconstruction(pipe, data).metrics["foreground_psnr"]

    def first_is_flat(images, side):
        pixels = to_pixels(images, side)
        if len(images) == 2:
            pixels[0] = 0.5
        return pixels

    monkeypatch.setattr(reconstruction, "to_pixels", first_is_flat)
    found = measure_reconstruction(pipe, data).metrics
    assert (found["psnr"].n, found["foreground_psnr"].n) == (3, 2)
    assert found["foreground_psnr"].value == pytest.approx(whole.value, abs=3)
    monkeypatch.setattr(reconstruction, "to_pixels", lambda *_: torch.zeros(2, 3, 32, 32))
    assert "foreground_psnr" not in measure_reconstruction(pipe, data).metrics


def test_pixels_go_to_the_device_of_the_pipeline_and_come_back(tmp_path):
    """A device that is not there: tensors sent to it are marked, until they are back."""
    source = open_manifest(write_squares(tmp_path)).sources["squares"]

    class Away(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    class Elsewhere(Rounding):
        def encode(self, pixels):
            assert isinstance(pixels, Away)
            return tuple(level.as_subclass(Away) for level in super().encode(pixels))

        def decode(self, codes):
            assert all(isinstance(level, Away) for level in codes)
            return super().decode(codes).as_subclass(Away)

    send = torch.Tensor.to

    def to(tensor, device, *args, **options):
        return (
            tensor.as_subclass(Away) if device == "away" else send(tensor, device, *args, **options)
        )

    pipe = SimpleNamespace(image_tokenizer=Elsewhere(), device="away")
    data = HeldOut(source, "test", batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        found = measure_reconstruction(pipe, data).metrics
    here = SimpleNamespace(image_tokenizer=Rounding(), device=torch.device("cpu"))
    assert found == measure_reconstruction(here, data).metrics
