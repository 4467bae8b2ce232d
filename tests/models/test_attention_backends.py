"""Choosing who computes attention."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from multimodal_dlm.errors import BackendError, ConfigError
from multimodal_dlm.models.attention import EAGER_MAX_LENGTH, UnifiedAttnProcessor
from multimodal_dlm.models.attention_plan import AttentionPlan
from tests.models.tiny import make_canvas, run, tiny_model

MASKED = torch.tensor([[0] * 4 + [1] * 6] * 2)
FULL = torch.zeros(2, 10, dtype=torch.long)


@pytest.mark.parametrize("order", [MASKED, FULL], ids=["masked", "mask_free"])
@pytest.mark.parametrize("backend", ["eager", "native", "_native_math"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_backends_agree(backend, order, kv_heads):
    model, canvas = tiny_model(num_key_value_heads=kv_heads), make_canvas(order)
    expected = run(model, canvas)
    model.set_attention_backend(backend)
    assert torch.allclose(run(model, canvas), expected, atol=1e-5)
    model.reset_attention_backend()
    assert torch.equal(run(model, canvas), expected)


def test_xformers_on_the_cpu_names_what_works():
    with pytest.raises(BackendError, match="xformers.*CPU.*`eager`, `native`"):
        tiny_model().set_attention_backend("xformers")


def test_xformers_is_also_refused_when_the_model_came_back_to_the_cpu():
    model = tiny_model()
    for block in model.blocks:
        block.attn.processor._attention_backend = AttentionBackendName.XFORMERS
    with pytest.raises(BackendError, match="Use one of|use one of"):
        run(model, make_canvas(FULL))


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `eager`"):
        tiny_model().set_attention_backend("eagr")


def test_a_backend_without_masks_takes_mask_free_plans_only():
    model = tiny_model()
    model.set_attention_backend("_native_flash")
    run(model, make_canvas(FULL))
    with pytest.raises(BackendError, match="takes no mask"):
        run(model, make_canvas(MASKED))


def test_flex_on_the_cpu_has_no_gradient():
    model = tiny_model()
    model.set_attention_backend("flex")
    with pytest.raises(BackendError, match="no gradient"):
        run(model, make_canvas(MASKED))


def test_the_choice_belongs_to_one_model():
    before = _AttentionBackendRegistry.get_active_backend()[0]
    first, second = tiny_model(), tiny_model()
    first.set_attention_backend("_native_math")
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    assert second.blocks[0].attn.processor._attention_backend is None


@pytest.mark.parametrize(
    ("dtype", "length", "expected"),
    [
        (torch.bfloat16, EAGER_MAX_LENGTH, "eager"),
        (torch.bfloat16, EAGER_MAX_LENGTH + 1, "native"),
        (torch.float32, 8, "native"),
    ],
)
def test_auto_chooses_by_dtype_and_length(dtype, length, expected):
    plan = AttentionPlan.build(order=torch.zeros(1, length, dtype=torch.long))
    qkv = torch.empty(1, length, 4, dtype=dtype)
    assert UnifiedAttnProcessor().choose(qkv, plan, None) == expected
