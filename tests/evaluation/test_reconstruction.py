from types import SimpleNamespace

import pytest
import torch

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures.reconstruction import (
    foreground,
    measure_reconstruction,
    peak_signal_to_noise,
)
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
    pipe = SimpleNamespace(image_tokenizer=Rounding())
    found = measure_reconstruction(pipe, HeldOut(source, "test", batch_size=2)).metrics
    assert (found["psnr"].n, found["codes_used.0"].n) == (3, 3)
    assert found["codes_used.0"].value == pytest.approx(1 / 3)
    assert found["perplexity.0"].value == pytest.approx(1.0)
    # A gray of its own for each picture is no better than its mean color.
    assert 10 < found["psnr"].value < found["psnr"].baselines["flat"] < 20
    assert found["foreground_psnr"].value < found["psnr"].value
    with pytest.raises(DataError, match="split `val`"):
        measure_reconstruction(pipe, HeldOut(source, "val"))
