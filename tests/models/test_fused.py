"""The fused functions against numerical and plain gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from multimodal_dlm.models import fused
from multimodal_dlm.models.attention import eager_attention
from multimodal_dlm.models.positions import apply_rotary, rotary_tables
from tests.models.tiny import make_canvas, run, tiny_model


def random(*shape):
    """A float64 leaf."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def rows():
    """Rows of a table of three for seven tokens, and their indicator."""
    index = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    return index, F.one_hot(index, 3).double().t().contiguous()


def test_norm_modulate(rows):
    index, one_hot = rows
    inputs = random(7, 6), random(3, 6), random(3, 6), index, one_hot, 1e-5
    assert gradcheck(fused.NormModulate.apply, inputs)
    expected = F.rms_norm(inputs[0], (6,), eps=1e-5) * inputs[1][index] + inputs[2][index]
    assert torch.allclose(fused.NormModulate.apply(*inputs), expected)


def test_norm_modulate_without_levels():
    inputs = random(7, 6), random(1, 6), None, None, None, 1e-5
    assert gradcheck(fused.NormModulate.apply, inputs)
    expected = F.rms_norm(inputs[0], (6,), inputs[1][0], 1e-5)
    assert torch.allclose(fused.NormModulate.apply(*inputs), expected)


def test_gated_add(rows):
    assert gradcheck(fused.GatedAdd.apply, (random(7, 6), random(7, 6), random(3, 6), *rows))


def test_gated_linear():
    inputs, weight = random(5, 4), random(6, 4)
    assert gradcheck(fused.GatedLinear.apply, (inputs, weight))
    gate, up = (inputs @ weight.t()).chunk(2, dim=-1)
    assert torch.allclose(fused.GatedLinear.apply(inputs, weight), F.silu(gate) * up)


@pytest.mark.parametrize("out_features", [3, 9])
def test_wide_linear(out_features):
    inputs, weight = random(5, 4), random(out_features, 4)
    assert gradcheck(fused.WideLinear.apply, (inputs, weight))
    assert torch.allclose(fused.WideLinear.apply(inputs, weight), inputs @ weight.t())


@pytest.mark.parametrize("has_bias", [False, True])
def test_rotary_attention(has_bias):
    qkv = random(2, 3, 6, 4)
    positions = torch.randint(0, 5, (2, 3, 2))
    tables = rotary_tables(positions, axes_dims=(2, 2), theta=10.0, dtype=torch.float64)
    bias = torch.zeros(2, 1, 3, 3, dtype=torch.float64) if has_bias else None
    if bias is not None:
        bias[:, :, 0, 1:] = float("-inf")
    inputs = qkv, tables.cos, tables.sin, bias
    assert gradcheck(fused.RotaryAttention.apply, inputs)
    query, key, value = qkv.split(2, dim=2)
    query, key = apply_rotary(query, tables), apply_rotary(key, tables)
    expected = eager_attention(query, key, value, bias).flatten(2)
    assert torch.allclose(fused.RotaryAttention.apply(*inputs), expected)


@pytest.mark.parametrize("options", [{}, {"noise_conditioning": "none"}, {"qk_norm": True}])
def test_a_training_step_is_the_same_fused_and_plain(options, monkeypatch):
    canvas = make_canvas(torch.tensor([[0] * 6 + [1] * 6] * 3))
    gradients = {}
    for is_fused in (True, False):
        model = tiny_model(**options).to(torch.bfloat16).train()
        if not is_fused:
            for name in ("fused", "attention", "layers"):
                target = f"multimodal_dlm.models.{name}.use_fused"
                monkeypatch.setattr(target, lambda _: False)
        run(model, canvas).float().square().mean().backward()
        gradients[is_fused] = {n: p.grad.float() for n, p in model.named_parameters()}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        other = gradients[False][name]
        similarity = F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0)
        assert similarity > 0.98 or other.norm() < 1e-3, name


def test_only_a_bare_layer_is_bypassed():
    layer = nn.Linear(4, 4, bias=False)
    assert fused.is_bare_linear(layer)
    assert not fused.is_bare_linear(nn.Linear(4, 4))
    assert not fused.is_bare_linear(nn.Linear(4, 4, bias=False).requires_grad_(False))
    layer.register_forward_hook(lambda *_: None)
    assert not fused.is_bare_linear(layer)
