"""Noise levels become modulations."""

import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.noise_conditioning import NUM_LEVELS, NoiseConditioning, level_index
from tests.models.tiny import make_canvas, run, tiny_model


def test_levels_are_quantised_upwards():
    shares = torch.tensor([[0.0, 1e-6, 1 / 256, 1.5 / 256, 0.5, 1.0]])
    assert level_index(shares).tolist() == [[0, 1, 1, 2, 128, NUM_LEVELS - 1]]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["ada_norm_single", "additive"])
def test_starts_bit_equal_to_none(kind, autocast):
    canvas = make_canvas(torch.tensor([[0] * 6 + [1] * 6] * 3))
    plain = tiny_model(noise_conditioning="none", randomise=False)
    model = tiny_model(noise_conditioning=kind, randomise=False)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("level_conditioning" in name or "scale_shift" in name for name in missing)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(run(model, canvas), run(plain, canvas))


@pytest.mark.parametrize("kind", ["ada_norm_single", "additive"])
def test_a_trained_model_reads_the_level(kind):
    canvas = make_canvas(torch.zeros(2, 8, dtype=torch.long))
    model = tiny_model(noise_conditioning=kind)
    levels = noise_levels(canvas, model.vocabulary)
    assert not torch.allclose(run(model, canvas), run(model, canvas, noise_levels=levels * 0.5))


def test_levels_are_gathered_per_token():
    module = NoiseConditioning(kind="ada_norm_single", hidden_size=8).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_()
    levels = torch.tensor([[0.0, 0.5, 1.0], [0.5, 0.25, 0.0]]).double()
    modulation = module(levels)
    assert modulation.features.shape == (4, 48)
    for row, column in ((0, 1), (1, 1), (1, 2)):
        alone = module.features(level_index(levels[row, column]).view(1))
        assert torch.allclose(modulation.features[modulation.rows[row, column]], alone[0])
    assert torch.equal(modulation.one_hot.argmax(0).view(2, 3), modulation.rows)


def test_conditioning_embeds_reach_their_own_row_only():
    canvas = make_canvas(torch.zeros(2, 6, dtype=torch.long))
    model = tiny_model()
    zero = torch.zeros(2, 32)
    extra = zero.clone()
    extra[1] = 1.0
    base, moved = (run(model, canvas, conditioning_embeds=value) for value in (zero, extra))
    assert torch.allclose(base, run(model, canvas), atol=1e-5)
    assert torch.allclose(base[0], moved[0], atol=1e-5)
    assert not torch.allclose(base[1], moved[1], atol=1e-2)


def test_conditioning_embeds_need_a_noise_embedding():
    canvas = make_canvas(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match="conditioning_embeds"):
        run(tiny_model(noise_conditioning="none"), canvas, conditioning_embeds=torch.zeros(1, 32))


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `additive`"):
        NoiseConditioning(kind="aditive", hidden_size=8)
