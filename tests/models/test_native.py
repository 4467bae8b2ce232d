"""The native halves of a block against float64 autograd, and what happens where they cannot run."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm.models import native
from multimodal_dlm.models.attention import eager_attention
from multimodal_dlm.models.native import bf16
from multimodal_dlm.models.positions import Rotary, apply_rotary, rotary_tables
from tests.models.tiny import make_canvas, run, tiny_model

BATCH, LEVELS, WIDTH, INNER, HEADS, DIM, EPS = 3, 4, 64, 96, 2, 32, 1e-5
WIDE = {"hidden_size": WIDTH, "intermediate_size": INNER, "axes_dims_rope": (16, 8, 8)}

needs_kernels = pytest.mark.skipif(
    native.kernels("amx") is None, reason="needs a CPU with AMX tiles and a C++ compiler"
)


def make_inputs(length):
    """bf16 states, float32 tables and weights, as leaves; then rows of the tables."""
    torch.manual_seed(0)
    tables = [torch.randn(LEVELS, WIDTH) * 0.1 + start for start in (1, 0, 1)]
    shapes = (2 * INNER, WIDTH), (WIDTH, INNER), (3 * HEADS * DIM, WIDTH), (WIDTH, HEADS * DIM)
    weights = [torch.randn(shape) * 0.2 for shape in shapes]
    states = torch.randn(BATCH, length, WIDTH).bfloat16()
    rows = torch.randint(LEVELS, (BATCH * length,), dtype=torch.int32)
    return states, tables, weights, rows


def make_attention(length, has_bias):
    """Rotary tables in bf16 and a bias that lets every query see itself."""
    positions = torch.randint(0, 30, (BATCH, length, 1))
    rotary = rotary_tables(positions, axes_dims=(DIM,), theta=100.0, dtype=torch.bfloat16)
    if not has_bias:
        return rotary, None
    hidden = torch.rand(BATCH, 1, length, length) < 0.4
    hidden.diagonal(dim1=-2, dim2=-1).fill_(False)
    return rotary, torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).bfloat16()


def plain_half(states, tables, weights, rows, middle):
    """x + gate y with y = out(middle(in(norm(x) factor + shift))), in the dtype of the states."""
    dtype = states.dtype
    factor, shift, gate = (table.to(dtype)[rows.long()].view_as(states) for table in tables)
    normed = F.rms_norm(states, (WIDTH,), None, EPS) * factor + shift
    return states + gate * (middle(normed @ weights[0].to(dtype).t()) @ weights[1].to(dtype).t())


def swiglu(inner):
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend(rotary, bias):
    def middle(inner):
        dtype = inner.dtype
        turned = Rotary(rotary.cos.to(dtype), rotary.sin.to(dtype))
        query, key, value = inner.unflatten(-1, (-1, DIM)).split(HEADS, dim=2)
        query, key = apply_rotary(query, turned), apply_rotary(key, turned)
        return eager_attention(query, key, value, None if bias is None else bias.to(dtype)).flatten(
            2
        )

    return middle


def results(half, states, tables, weights, rows, dtype):
    """Output and all gradients of a half of a block with parameters in float32 or better."""
    better = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [states.to(dtype), *(tensor.to(better) for tensor in (*tables, *weights))]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = half(leaves[0], leaves[1:4], leaves[4:], rows)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_halves(native_half, plain, *inputs):
    """The native result is as near to float64 as plain bf16 is, output and every gradient.

    Both round activations to bf16 at the same places; the plain path rounds more often. A factor
    of 1.5 leaves room for chance: what was measured is 0.4 to 1.0.
    """
    reference = results(plain, *inputs, torch.float64)
    low = results(plain, *inputs, torch.bfloat16)
    own = results(native_half, *inputs, torch.bfloat16)
    for number, (exact, rounded, found) in enumerate(zip(reference, low, own, strict=True)):
        assert found.shape == exact.shape
        error, allowed = (found - exact).norm(), 1.5 * (rounded - exact).norm()
        assert error <= allowed, (number, float(error), float(allowed))
        assert error < 0.03 * exact.norm(), number


@needs_kernels
@pytest.mark.parametrize("length", [45, 96])
def test_the_mlp_half(length):
    states, tables, weights, rows = make_inputs(length)

    def native_half(states, tables, weights, rows):
        out = bf16.GatedMLP.apply(states.flatten(0, 1), *tables, rows, *weights, EPS)
        return out.view_as(states)

    def plain(states, tables, weights, rows):
        return plain_half(states, tables, weights, rows, swiglu)

    check_halves(native_half, plain, states, tables, weights[:2], rows)


@needs_kernels
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("length", [7, 45, 96])
def test_the_attention_half(length, has_bias):
    states, tables, weights, rows = make_inputs(length)
    rotary, bias = make_attention(length, has_bias)

    def native_half(states, tables, weights, rows):
        inputs = states, *tables, rows, *weights, rotary.cos, rotary.sin, bias, EPS
        return bf16.GatedAttention.apply(*inputs)

    def plain(states, tables, weights, rows):
        return plain_half(states, tables, weights, rows, attend(rotary, bias))

    check_halves(native_half, plain, states, tables, weights[2:], rows)


def model_gradients(canvas, *, dtype=torch.float32, is_exact=False, **options):
    """Gradients of a wide tiny model by name, the operators that ran, and their FLOPs.

    With bf16 autocast, or in float64 throughout when `is_exact`.
    """
    model = tiny_model(**{**WIDE, **options}).to(torch.float64 if is_exact else dtype).train()
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_exact):
            states = run(model, canvas)
        states.to(torch.float64).square().mean().backward()
    names = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return gradients, names, counter.get_total_flops()


@needs_kernels
@pytest.mark.parametrize(
    "options", [{}, {"noise_conditioning": "none"}, {"dtype": torch.bfloat16}, {"qk_norm": True}]
)
def test_a_model_trains_the_same_natively(options, monkeypatch):
    canvas = make_canvas(torch.tensor([[0] * 20 + [1] * 17] * 3))
    found, names, _ = model_gradients(canvas, **options)
    assert "multimodal_dlm.mlp_backward" in names
    assert ("multimodal_dlm.attention_backward" in names) == ("qk_norm" not in options)
    monkeypatch.setattr(bf16, "kernels", lambda name: None)
    plain, names, _ = model_gradients(canvas, **options)
    assert not any("multimodal_dlm" in name for name in names)
    exact, _, _ = model_gradients(canvas, is_exact=True, **options)
    for name, gradient in exact.items():
        error = (found[name] - gradient).norm()
        assert error <= 2 * (plain[name] - gradient).norm() + 1e-4 * gradient.norm(), name


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_threads_give_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr(bf16, "num_threads", lambda: threads)
    canvas = make_canvas(torch.tensor([[0] * 70] * 5))
    first, second = (model_gradients(canvas)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernels
def test_matmul_flops_are_counted_as_pytorch_counts_its_own(monkeypatch):
    canvas = make_canvas(torch.tensor([[0] * 64] * 2))
    _, _, found = model_gradients(canvas, noise_conditioning="none")
    monkeypatch.setattr(bf16, "kernels", lambda name: None)
    _, _, plain = model_gradients(canvas, noise_conditioning="none")
    tokens, tables = 2 * 64, 2 * 2 * 2  # one factor a half; PyTorch sums its gradient by a product
    scores_again = 2 * 2 * tokens * 64 * HEADS * DIM  # not kept for backward
    assert found == plain + scores_again - tables * tokens * WIDTH


@needs_kernels
def test_a_layer_that_is_more_than_its_weight_takes_the_plain_path():
    canvas = make_canvas(torch.tensor([[0] * 40] * 2))
    model = tiny_model(**WIDE).to(torch.bfloat16).train()
    model.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    model.blocks[0].attn.to_qkv.weight.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        run(model, canvas).float().sum().backward()
    counts = counter.get_flop_counts()
    for half in ("attention_forward", "mlp_forward"):
        operator = getattr(torch.ops.multimodal_dlm, half)
        assert operator not in counts["UnifiedTransformerModel.blocks.0"]
        assert operator in counts["UnifiedTransformerModel.blocks.1"]


@needs_kernels
@pytest.mark.parametrize("hooked", ["attn", "norm1", "mlp", "norm2"])
def test_hooks_of_a_half_are_called(hooked):
    model, seen = tiny_model(**WIDE).to(torch.bfloat16).train(), []
    getattr(model.blocks[0], hooked).register_forward_hook(lambda *_: seen.append(hooked))
    run(model, make_canvas(torch.tensor([[0] * 40] * 2))).float().sum().backward()
    assert seen == [hooked]


@needs_kernels
def test_weights_in_other_dtypes_take_the_plain_path():
    canvas = make_canvas(torch.tensor([[0] * 40] * 2))
    model = tiny_model(**WIDE).half().train()
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        run(model, canvas).float().sum().backward()
    counts = counter.get_flop_counts()["UnifiedTransformerModel.blocks.0"]
    assert torch.ops.multimodal_dlm.mlp_forward not in counts


@needs_kernels
def test_a_library_is_not_loaded_from_a_folder_that_others_may_write(
    fresh, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "multimodal_dlm"
    folder.mkdir()
    folder.chmod(0o777)
    assert fresh("amx") is None
    assert "must belong to you" in caplog.text


@pytest.fixture
def fresh(monkeypatch):
    """`kernels` without what it remembers."""
    uncached = native.kernels.__wrapped__
    monkeypatch.delenv(native.SWITCH, raising=False)
    return uncached


def test_the_switch_turns_the_kernels_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv(native.SWITCH, "0")
    with caplog.at_level(logging.INFO):
        assert fresh("amx") is None
    assert "switched off by MULTIMODAL_DLM_NATIVE=0" in caplog.text


def test_another_cpu_trains_without_them(fresh, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level(logging.INFO):
        assert fresh("amx") is None
    assert "need a CPU with AMX tiles" in caplog.text


@needs_kernels
def test_no_compiler_and_a_broken_one_are_logged(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fresh("amx") is None
    assert "there is no C++ compiler. Install g++" in caplog.text
    monkeypatch.setenv("CXX", "false")
    assert fresh("amx") is None
    assert "returned non-zero exit status" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_nothing_is_compiled_or_loaded_at_import():
    code = (
        "import multimodal_dlm.models.transformer, multimodal_dlm.models.native as native;"
        "assert native.kernels.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
