"""Float32 parts of a block on AVX2 and AVX-512: against float64, alone, in batches, and when."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm.models import native
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.fused import plain_functions
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.native import float32
from multimodal_dlm.models.positions import apply_rotary, rotary_tables
from tests.models.tiny import make_canvas, run, tiny_model, tolerance

LEVELS, WIDTH, INNER, HEADS, TURNED, DIM, EPS = 4, 64, 96, 5, 4, 32, 1e-5
WIDE = {"hidden_size": WIDTH, "intermediate_size": INNER, "axes_dims_rope": (16, 8, 8)}
ORDER = torch.tensor([[0] * 20 + [1] * 17] * 3)
PARTS = {"float_mlp", "float_project", "float_add_projected"}
SIZES = (1, 5, 6, 7, 14, 15, 192, 193, 400)
SETS = [name for name in ("avx2", "avx512") if native.SETS[name].is_supported()]
LIBRARIES = {name: native.load(name) for name in SETS}

pytestmark = pytest.mark.skipif(
    None in LIBRARIES.values() or not SETS, reason="needs AVX2 and a C++ compiler"
)


@pytest.fixture(autouse=True, params=SETS)
def _every_set(request, monkeypatch):
    monkeypatch.setattr(float32, "kernels", lambda name: LIBRARIES[request.param])


def make_inputs(tokens):
    """States, tables, rows and four weights."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tables = [draw(LEVELS, WIDTH) * 0.1 + start for start in (1, 0, 1)]
    shapes = (2 * INNER, WIDTH), (WIDTH, INNER), (HEADS * DIM, WIDTH), (WIDTH, HEADS * DIM)
    rows = torch.randint(LEVELS, (tokens,), generator=generator, dtype=torch.int32)
    return draw(tokens, WIDTH), tables, rows, [draw(*shape) * 0.2 for shape in shapes]


def turns(tokens):
    positions = torch.arange(tokens)[None, :, None]
    return rotary_tables(positions, axes_dims=(DIM,), theta=100.0)


def results(tokens, threads, monkeypatch, of=slice(None)):
    """What the three parts say of some of the tokens."""
    monkeypatch.setattr(float32, "num_threads", lambda: threads)
    states, (factor, shift, gate), rows, weights = make_inputs(tokens)
    w_in, w_out, w_heads, w_back = (float32.pack(weight) for weight in weights)
    rotary, x, rows = turns(tokens), states[of].contiguous(), rows[of].contiguous()
    cos, sin = rotary.cos[:, of].contiguous(), rotary.sin[:, of].contiguous()
    heads = float32.float_project(x, factor, shift, rows, w_heads, cos, sin, TURNED, EPS)
    back = float32.float_add_projected(x, gate, rows, heads.flatten(1), w_back)
    return float32.float_mlp(x, factor, shift, gate, rows, w_in, w_out, EPS), heads, back


def expected(tokens):
    """The same in plain float64."""
    states, tables, rows, weights = make_inputs(tokens)
    x = states.double()
    factor, shift, gate = (table.double()[rows.long()] for table in tables)
    w_in, w_out, w_heads, w_back = (weight.double().t() for weight in weights)
    normed = F.rms_norm(x, (WIDTH,), None, EPS) * factor + shift
    g, u = (normed @ w_in).chunk(2, dim=-1)
    rotary = rotary_tables(
        torch.arange(tokens)[None, :, None], axes_dims=(DIM,), theta=100.0, dtype=torch.float64
    )
    heads = (normed @ w_heads).view(1, tokens, HEADS, DIM)
    heads = torch.cat([apply_rotary(heads[:, :, :TURNED], rotary), heads[:, :, TURNED:]], dim=2)[0]
    back = x + gate * (heads.flatten(1) @ w_back)
    return x + gate * ((F.silu(g) * u) @ w_out), heads, back


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens", SIZES)
def test_parts_are_those_of_float64(tokens, threads, monkeypatch):
    for found, exact in zip(results(tokens, threads, monkeypatch), expected(tokens), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 3e-6 * exact.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_token_has_the_same_bits_alone_and_beside_others(threads, monkeypatch):
    together = results(400, 2, monkeypatch)
    for of in (slice(0, 1), slice(3, 9), slice(150, 393)):
        for whole, part in zip(together, results(400, threads, monkeypatch, of), strict=True):
            assert torch.equal(whole[of], part)


def test_every_set_has_the_same_bits(monkeypatch):
    if len(SETS) < 2:
        pytest.skip("this CPU has AVX2 alone")
    found = []
    for library in LIBRARIES.values():
        monkeypatch.setattr(float32, "kernels", lambda name, library=library: library)
        found.append(results(193, 2, monkeypatch))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [-200.0, -90.0, -1.0, 0.0, 1e-30, 88.5, 1e4])
def test_extreme_gates_stay_finite(value):
    states, (factor, shift, gate), rows, (w_in, w_out, *_) = make_inputs(4)
    w_in[:INNER], w_in[INNER:] = 0.0, 0.0
    shift[:], factor[:] = 1.0, 0.0
    w_in[:INNER, 0], w_in[INNER:, 0] = value, 1.0
    panels = float32.pack(w_in), float32.pack(w_out)
    found = float32.float_mlp(states, factor, shift, gate, rows, *panels, EPS)
    silu = F.silu(torch.tensor(value)).expand(4, INNER)
    expected = states + gate[rows.long()] * (silu @ w_out.t())
    # Sums of as large numbers may cancel.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, abs(value)))


@torch.no_grad()
def states_of(model, canvas):
    return run(model, canvas)


def operators(model, canvas, compute=states_of):
    with FlopCounterMode(display=False) as counter:
        compute(model, canvas)
    names = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    return {name.rpartition(".")[2] for name in names if "multimodal_dlm" in name}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_conditioning": "none"},
        {"noise_conditioning": "additive"},
        {"num_key_value_heads": 1},
    ],
)
def test_a_model_is_as_near_to_float64_as_plain_float32(options):
    canvas, model = make_canvas(ORDER), tiny_model(**{**WIDE, **options})
    exact = states_of(copy.deepcopy(model).double(), canvas)
    assert operators(model, canvas) == PARTS
    error = (states_of(model, canvas) - exact).norm()
    with FlopCounterMode(display=False) as counter:
        states_of(model, canvas)
    flops = counter.get_total_flops()
    with plain_functions():
        assert not operators(model, canvas)
        plain_error = (states_of(model, canvas) - exact).norm()
        with FlopCounterMode(display=False) as counter:
            states_of(model, canvas)
    assert error < 2 * plain_error < 1e-4 * exact.norm()
    assert flops == counter.get_total_flops()


def test_forwards_with_a_cache_run_on_them_too():
    canvas, model = make_canvas(ORDER), tiny_model(**WIDE)
    whole = states_of(model, canvas)
    model.enable_cache(ExactCacheConfig(num_prefixes=0))
    plan = AttentionPlan.from_canvas(canvas)
    cache = model.new_cache(plan, canvas.is_free)

    @torch.no_grad()
    def cached(model, canvas):
        return run(model, canvas, attention_plan=plan, kv_cache=cache)

    for _ in range(2):  # The second forward computes open columns alone.
        found = cached(model, canvas)
        is_computed = (found != 0).any(dim=-1)
        assert is_computed.any()
        error = (found - whole)[is_computed].abs().max()
        assert error <= tolerance(torch.float32, whole)
    assert operators(model, canvas, cached) == PARTS


def with_hook(model):
    model.blocks[0].attn.register_forward_hook(lambda *_: None)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)


def with_norms(model):
    return tiny_model(**WIDE, qk_norm=True)


def in_double(model):
    return model.double()


@pytest.mark.parametrize(
    ("change", "left"),
    [(with_hook, {"float_mlp"}), (with_norms, {"float_mlp"}), (in_double, set())],
)
def test_what_they_cannot_do_is_left_to_pytorch(change, left):
    model = tiny_model(**WIDE)
    model = change(model) or model
    assert operators(model, make_canvas(ORDER)) == left


def test_gradients_are_left_to_pytorch():
    model, canvas = tiny_model(**WIDE), make_canvas(ORDER)
    assert not operators(model, canvas, run)


def test_a_changed_weight_is_laid_out_anew():
    canvas, model = make_canvas(ORDER), tiny_model(**WIDE)
    before = states_of(model, canvas)
    for name in ("attn.to_qkv", "attn.to_out", "mlp.gate_up_proj", "mlp.down_proj"):
        model.blocks[1].get_submodule(name).weight.data.mul_(1.5)
        after = states_of(model, canvas)
        assert not torch.equal(after, before)
        assert torch.equal(after, states_of(copy.deepcopy(model), canvas))
        before = after


def test_copies_of_weights_do_not_outlive_a_cast():
    canvas, model = make_canvas(ORDER), tiny_model(**WIDE)
    states_of(model, canvas)
    assert all(half._kept for block in model.blocks for half in block._packed)
    model.to(torch.bfloat16)
    assert not any(half._kept for block in model.blocks for half in block._packed)
