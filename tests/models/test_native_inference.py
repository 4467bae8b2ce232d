"""The native halves without gradients: the bits of training, and weights that change."""

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm.models import native
from multimodal_dlm.models.fused import plain_functions
from multimodal_dlm.models.native import bf16, weights
from tests.models.test_native import EPS, WIDE, make_attention, make_inputs
from tests.models.tiny import make_canvas, run, tiny_model

pytestmark = pytest.mark.skipif(
    native.kernels("amx") is None, reason="needs a CPU with AMX tiles and a C++ compiler"
)
ORDER = torch.tensor([[0] * 20 + [1] * 17] * 3)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [7, 45, 96])
def test_the_bits_are_those_of_the_training_kernels(length, threads, monkeypatch):
    monkeypatch.setattr(bf16, "num_threads", lambda: threads)
    states, tables, weights, rows = make_inputs(length)
    rotary, bias = make_attention(length, has_bias=True)
    gate_up, down, to_qkv, to_out = (bf16.pack_forward(weight) for weight in weights)
    flat = states.flatten(0, 1)
    mlp = flat, *tables, rows, gate_up, down, EPS
    assert torch.equal(bf16.mlp_inference(*mlp), bf16.mlp_forward(*mlp)[0])
    attention = states, *tables, rows, to_qkv, to_out, rotary.cos, rotary.sin, bias, EPS
    expected = bf16.attention_forward(*attention)[0]
    assert torch.equal(bf16.attention_inference(*attention), expected)
    assert not torch.equal(expected, states)


@torch.no_grad()
def states_of(model, canvas):
    return run(model, canvas)


def operators(model, canvas):
    with FlopCounterMode(display=False) as counter:
        states_of(model, canvas)
    names = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    return {name.rpartition(".")[2] for name in names if "multimodal_dlm" in name}


@pytest.mark.parametrize("options", [{}, {"noise_conditioning": "none"}])
def test_a_model_is_as_near_to_float64_as_plain_bf16(options):
    canvas = make_canvas(ORDER)
    model = tiny_model(**{**WIDE, **options})
    exact = states_of(copy.deepcopy(model).double(), canvas)
    model = model.to(torch.bfloat16)
    exact_error = (states_of(model, canvas) - exact).norm()
    with plain_functions():
        plain_error = (states_of(model, canvas) - exact).norm()
        assert not operators(model, canvas)
    assert operators(model, canvas) == {"mlp_inference", "attention_inference"}
    assert exact_error <= 1.2 * plain_error
    assert exact_error < 0.05 * exact.norm()


def test_frozen_weights_and_autocast_run_natively():
    canvas = make_canvas(ORDER)
    model = tiny_model(**WIDE).requires_grad_(False)
    parts = {"mlp_inference", "attention_inference"}
    assert not operators(model, canvas) & parts  # float32 has kernels of its own.
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(model, canvas) == parts


def changed_in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def changed_through_data(weight):
    weight.data.mul_(1.5)


def changed_for_another(weight):
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [changed_in_place, changed_through_data, changed_for_another])
@pytest.mark.parametrize(
    "layer", ["attn.to_qkv", "attn.to_out", "mlp.gate_up_proj", "mlp.down_proj"]
)
def test_a_changed_weight_is_laid_out_anew(layer, change):
    canvas = make_canvas(ORDER)
    model = tiny_model(**WIDE).to(torch.bfloat16)
    before = states_of(model, canvas)
    assert torch.equal(states_of(model, canvas), before)
    change(model.blocks[1].get_submodule(layer).weight)
    found = states_of(model, canvas)
    assert not torch.equal(found, before)
    assert torch.equal(found, states_of(copy.deepcopy(model), canvas))


def test_what_is_kept_does_not_travel(monkeypatch):
    packs = []
    pack = bf16.pack_forward
    layout = bf16.LAYOUT._replace(pack=lambda w: packs.append(w.shape) or pack(w))
    monkeypatch.setattr(bf16, "LAYOUT", layout)
    canvas = make_canvas(ORDER)
    model = tiny_model(**WIDE).to(torch.bfloat16)
    states_of(model, canvas)
    states_of(model, canvas)
    assert len(packs) == 4 * 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        packs.clear()
        states_of(other, canvas)
        assert len(packs) == 4 * 2


def test_large_weights_are_not_kept_twice(monkeypatch):
    canvas = make_canvas(ORDER)
    model = tiny_model(**{**WIDE, "intermediate_size": 128}).to(torch.bfloat16)
    largest = 2 * model.blocks[0].mlp.gate_up_proj.weight.numel()
    monkeypatch.setattr(weights, "MAX_KEPT", largest - 1)
    assert operators(model, canvas) == {"attention_inference"}
