"""Probes on vectors whose information is known, and the sweep on a tiny pipeline."""

import math

import pytest
import torch

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import noise_spectrum
from multimodal_dlm.evaluation.measures.noise_spectrum import measure_noise_spectrum
from multimodal_dlm.evaluation.probes import encode_labels, probe
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from tests.evaluation.toy import COLORS, write_squares
from tests.pipelines.tiny import tiny_components


def test_a_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 5, generator=generator)
    told = torch.nn.functional.one_hot(labels, 3).float()
    sure = probe(torch.cat([noise, told], dim=1), labels)
    assert sum(sure.right) == 300
    assert sure.information == pytest.approx(math.log(3), abs=0.1)
    blind = probe(noise, labels)
    assert abs(sum(blind.right) / 300 - 1 / 3) < 0.1
    assert blind.information < 0.02
    assert probe(noise, labels).nats == blind.nats


def test_twins_of_a_judged_row_are_not_fitted_to():
    """Vectors tell the unit alone, labels are drawn for each unit: nothing can be learnt."""
    generator = torch.Generator().manual_seed(0)
    units = torch.arange(60).repeat_interleave(4)
    vectors = torch.nn.functional.one_hot(units, 60).float()
    labels = (torch.rand(60, generator=generator) < 0.5).long()[units]
    by_row = probe(vectors, labels)
    by_unit = probe(vectors, labels, groups=units.tolist())
    assert sum(by_row.right) > 0.9 * len(labels)
    assert sum(by_unit.right) < 0.65 * len(labels)
    assert by_row.information > 0.3 > 0.05 > by_unit.information
    shares = torch.bincount(labels) / len(labels)
    assert by_unit.prior_nats == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-5)
    with pytest.raises(DataError, match="needs 4 units, one for each fold; got 3"):
        probe(vectors, labels, groups=(units % 3).tolist())


def test_other_vectors_are_read_by_the_probe_of_their_fold():
    labels = torch.arange(40) % 2
    told = torch.nn.functional.one_hot(labels, 2).float()
    assert probe(told, labels, other=told).predicted == labels.tolist()
    assert probe(told, labels, other=1 - told).predicted == (1 - labels).tolist()


def test_rare_labels_are_left_out():
    rows, classes = encode_labels(["b", "a", "b", "a", "c"], min_count=2)
    assert rows == [0, 1, 2, 3]
    assert classes.tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="needs two labels with 2 rows each"):
        encode_labels(["a", "a", "b"], min_count=2)


def test_the_sweep_of_a_tiny_pipeline(tmp_path, monkeypatch):
    source = open_manifest(write_squares(tmp_path, {"train": 30})).sources["squares"]
    pipe = UnifiedTextToImagePipeline(**tiny_components())

    def encode(pixels):
        colors = pixels[:, :, 16, 16].argmax(dim=1)
        grids = pipe.processor.image_grids
        return tuple(colors[:, None, None].expand(-1, *grid).clone() for grid in grids)

    monkeypatch.setattr(pipe.image_tokenizer, "encode", encode)
    # Colors are the names here: folds by name would leave the judged color out of every fit.
    monkeypatch.setattr(noise_spectrum, "name_of_sample", lambda sample: sample.record.key)
    options = {"attributes": ("concept",), "num_levels": 3}
    found = measure_noise_spectrum(pipe, HeldOut(source, "train", batch_size=7), **options)
    for level in ("0", "0.5", "1"):
        for where in ("picture", "caption", "reconstructed"):
            metric = found.metrics[f"{where}.concept.{level}"]
            assert metric.n == 30
            assert metric.baselines["majority"] == pytest.approx(1 / len(COLORS))
    # Codes tell the colors; with every code masked all pictures look the same.
    assert found.metrics["picture.concept.0"].value > 0.9
    assert found.metrics["picture.concept.1"].value < 0.6
    assert found.metrics["reconstructed.concept.0"].value > 0.9
    (curve,) = (each for title, each in found.curves.items() if "one step" in title)
    assert curve.lines["codes right"][0] == 1.0  # Nothing is masked.
    assert "codes_right.0" not in found.metrics
    chance = 1 / pipe.image_tokenizer.codebook_sizes[0]
    assert found.metrics["codes_right.1"].baselines == {"chance": pytest.approx(chance)}
    again = measure_noise_spectrum(pipe, HeldOut(source, "train", batch_size=30), **options)
    for name, metric in again.metrics.items():
        assert metric.value == pytest.approx(found.metrics[name].value, abs=0.1), name


def test_folds_of_the_sweep_go_by_name(tmp_path, monkeypatch):
    source = open_manifest(write_squares(tmp_path, {"train": 30})).sources["squares"]
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    monkeypatch.setattr(
        noise_spectrum,
        "name_of_sample",
        lambda sample: sample.record.key[:7],  # 0, 1, 2, 3 ... 9.
    )
    seen = []

    def watch(*args, groups, **options):
        seen.append(groups)
        return probe(*args, groups=groups, **options)

    monkeypatch.setattr(noise_spectrum, "probe", watch)
    data = HeldOut(source, "train")
    measure_noise_spectrum(pipe, data, attributes=("concept",), num_levels=2)
    names = [sample.record.key[:7] for sample in data.samples()]
    assert len(seen) == 6
    for groups in seen:
        assert len(set(zip(groups, names, strict=True))) == len(set(groups)) == len(set(names))


def test_a_level_that_masks_nothing_has_every_code_right(tmp_path):
    source = open_manifest(write_squares(tmp_path, {"train": 3})).sources["squares"]
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    data = HeldOut(source, "train")
    codes = noise_spectrum.encode_images(pipe, [s.image for s in data.samples()], 3)
    assert noise_spectrum._sweep(pipe, codes, 0.0, data).codes_right == [1.0] * 3
