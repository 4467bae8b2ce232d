"""The image-text scorer on features whose answer is known, and the metrics it gives."""

import pytest
import torch

from multimodal_dlm.errors import CheckpointError, ConfigError, DataError
from multimodal_dlm.evaluation.scorer import (
    DEFAULT_FOLDER,
    ImageTextScorer,
    ScorerConfig,
    fit_scorer,
    held_out_pair,
    name_ranks,
)
from multimodal_dlm.evaluation.suites import open_suite
from tests.conftest import REPOSITORY

SMALL = ScorerConfig(hidden=16, width=8)


def toy_pairs(num_names=6, copies=8):
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(num_names, 384, generator=generator)
    labels = torch.arange(num_names).repeat(copies)
    centres = torch.randn(num_names, 1280, generator=generator)
    noise = torch.randn(len(labels), 1280, generator=generator)
    return centres[labels] + 0.3 * noise, labels, names


def test_a_fitted_scorer_names_pictures_it_has_not_seen():
    features, labels, names = toy_pairs()
    fitted = fit_scorer(features[6:], labels[6:], names, config=SMALL, num_epochs=60, seed=1)
    ranks = name_ranks(fitted.score(features[:6], names), labels[:6].tolist())
    assert ranks.tolist() == [1.0] * 6
    again = fit_scorer(features[6:], labels[6:], names, config=SMALL, num_epochs=60, seed=1)
    assert torch.equal(fitted.score(features, names), again.score(features, names))
    blind = ImageTextScorer(SMALL).eval()
    assert name_ranks(blind.score(features, names), labels.tolist()).mean() > 1.5
    with pytest.raises(DataError, match="must be the place of a name; got 5 with 3 names"):
        fit_scorer(features, labels, names[:3], config=SMALL)


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.9], [0.3, 0.3, 0.3]])
    assert name_ranks(scores, [0, 1, 2]).tolist() == [1.0, 2.5, 2.0]
    with pytest.raises(ConfigError, match="got 2 for 3"):
        name_ranks(scores, [0, 1])


def test_a_saved_scorer_scores_the_same_but_for_half_precision(tmp_path):
    features, _, names = toy_pairs()
    scorer = ImageTextScorer(SMALL).eval()
    scorer.save(tmp_path)
    loaded = ImageTextScorer.load(tmp_path)
    expected = scorer.score(features, names)
    assert torch.allclose(loaded.score(features, names), expected, atol=5e-3)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    (tmp_path / "config.json").write_text('{"format": "other"}')
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="`scorer` must be a folder with"):
            ImageTextScorer.load(folder)


def test_pictures_are_held_out_by_concept_and_artist_for_ever():
    held = [held_out_pair(f"thing {n}", "noto", 0.1) for n in range(2000)]
    assert 0.07 < sum(held) / len(held) < 0.13
    assert held == [held_out_pair(f"thing {n}", "noto", 0.1) for n in range(2000)]


def test_the_released_scorer_is_small_and_loads():
    folder = REPOSITORY / DEFAULT_FOLDER
    assert (folder / "model.safetensors").stat().st_size < 2 * 2**20
    scorer = ImageTextScorer.load(folder)
    scores = scorer.score(torch.randn(2, 1280), torch.randn(3, 384))
    assert scores.shape == (2, 3)
    assert float(scores.abs().max()) <= 1 + 1e-5
    for suite in ("default", "quick"):
        named = [entry.options.get("scorer") for entry in open_suite(suite).entries]
        assert {DEFAULT_FOLDER, None} == set(named)
