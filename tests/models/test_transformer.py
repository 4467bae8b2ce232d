"""The backbone: independence, exactness, save and load, adapters, memory savers."""

import json

import jaxtyping
import pytest
import torch
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.errors import ConfigError, VocabularyError
from multimodal_dlm.layout import make_layout
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.transformer import UnifiedTransformerModel, previous_states
from multimodal_dlm.vocabulary import UnifiedVocabulary
from tests.models.tiny import AXES, make_canvas, run, tiny_model, tiny_vocabulary, tolerance

DTYPES = [torch.float32, torch.float64]
FULL = torch.zeros(3, 10, dtype=torch.long)


def insert_columns(canvas: Canvas, column: int, num: int) -> Canvas:
    """The canvas with padding columns inserted."""
    vocabulary = tiny_vocabulary()

    def wider(values: Tensor, fill: int) -> Tensor:
        shape = (values.shape[0], num, *values.shape[2:])
        middle = torch.full(shape, fill, dtype=values.dtype)
        return torch.cat([values[:, :column], middle, values[:, column:]], dim=1)

    fills = {"input_ids": vocabulary.special_id("pad"), "is_padding": True, "window_ids": 1}
    names = canvas.__dataclass_fields__
    return Canvas(**{name: wider(getattr(canvas, name), fills.get(name, 0)) for name in names})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 4, 10])
def test_padding_never_changes_a_token(dtype, column):
    model, canvas = tiny_model().to(dtype), make_canvas(FULL)
    padded = insert_columns(canvas, column, 3)
    logits = model.compute_logits(run(model, canvas), "image")
    wide = model.compute_logits(run(model, padded), "image")
    kept = torch.cat([wide[:, :column], wide[:, column + 3 :]], dim=1)
    assert (kept - logits).abs().max() <= tolerance(dtype, logits)


def test_the_id_under_padding_is_never_read():
    model, canvas = tiny_model(), insert_columns(make_canvas(FULL), 4, 2)
    ids = canvas.input_ids.clone()
    ids[:, 4:6] = 3
    changed = run(model, canvas.replace(input_ids=ids))[~canvas.is_padding]
    assert torch.equal(changed, run(model, canvas)[~canvas.is_padding])


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_never_change_a_row(dtype):
    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 7:] = True
    model, canvas = tiny_model().to(dtype), make_canvas(FULL, is_padding=padding)
    together = run(model, canvas)
    for row in range(3):
        alone = run(model, canvas.select_rows(slice(row, row + 1)))[0]
        keep = ~padding[row]
        difference = (together[row] - alone)[keep].abs().max()
        assert difference <= tolerance(dtype, together)


def test_packed_documents_never_see_each_other():
    model, canvas = tiny_model(), make_canvas(FULL)
    documents = torch.tensor([[0] * 4 + [1] * 6] * 3)
    canvas = canvas.replace(document_ids=documents)
    ids = canvas.input_ids.clone()
    ids[:, :4] = 5
    levels = noise_levels(canvas, model.vocabulary)
    base = run(model, canvas, noise_levels=levels)
    changed = run(model, canvas.replace(input_ids=ids), noise_levels=levels)
    assert torch.allclose(base[:, 4:], changed[:, 4:], atol=1e-6)
    assert not torch.allclose(base[:, :4], changed[:, :4], atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "order",
    [[0] * 4 + [1] * 6, [1] * 6 + [0] * 4, [0] * 3 + [1] * 3 + [2] * 4, list(range(10))],
    ids=["prefix", "prefix_at_the_end", "blocks", "causal"],
)
def test_a_token_never_depends_on_a_later_order(order, dtype):
    model, canvas = tiny_model().to(dtype), make_canvas(torch.tensor([order] * 2))
    levels = noise_levels(canvas, model.vocabulary)
    base = run(model, canvas, noise_levels=levels)
    last = canvas.order == canvas.order.max()
    ids = torch.where(last, 3, canvas.input_ids)
    positions = canvas.position_ids + last.unsqueeze(-1)
    changed = canvas.replace(input_ids=ids, position_ids=positions)
    after = run(model, changed, noise_levels=torch.where(last, 0.75, levels))
    assert (base - after)[~last].abs().max() <= tolerance(dtype, base)
    assert (base - after)[last].abs().max() > 1e-2


def test_causal_equals_a_llama_of_the_same_weights():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=88,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    vocabulary = UnifiedVocabulary.build(segments={"text": [("text", 24)]})
    model = tiny_model(
        vocabulary=vocabulary.to_dict(),
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500.0,
        axes_dims_rope=(8,),
        tie_word_embeddings=False,
        noise_conditioning="none",
        logits_shift=1,
    )
    model.load_state_dict(from_llama(llama.state_dict(), num_layers=2))
    ids = torch.randint(0, 88, (2, 9))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    order = torch.arange(9).expand(2, 9)
    states = model(
        ids,
        noise_levels=torch.zeros(2, 9),
        position_ids=order.unsqueeze(-1),
        attention_plan=AttentionPlan.build(order=order, is_padding=padding),
    ).hidden_states
    with torch.no_grad():
        expected = llama(ids, attention_mask=(~padding).long()).logits[:, :-1, :24]
    logits = model.compute_logits(states, "text")[:, 1:]
    assert torch.allclose(logits[~padding[:, 1:]], expected[~padding[:, 1:]], atol=2e-5)


def from_llama(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Llama's state dict under our names: Q, K, V in one matrix, gate and up in one."""
    ours = {
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for layer in range(num_layers):
        theirs, block = f"model.layers.{layer}", f"blocks.{layer}"
        qkv = [weights[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        gate_up = [weights[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ours |= {
            f"{block}.norm1.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{block}.norm2.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
            f"{block}.attn.to_qkv.weight": torch.cat(qkv),
            f"{block}.attn.to_out.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{block}.mlp.gate_up_proj.weight": torch.cat(gate_up),
            f"{block}.mlp.down_proj.weight": weights[f"{theirs}.mlp.down_proj.weight"],
        }
    return ours


def test_previous_states_skip_padding():
    states = torch.arange(6.0).view(1, 6, 1)
    padding = torch.tensor([[False, False, True, True, False, False]])
    shifted = previous_states(states, padding)[0, :, 0]
    assert shifted[[0, 1, 4, 5]].tolist() == [0, 0, 1, 4]
    first = previous_states(states, padding.roll(-2, dims=1))[0, :, 0]
    assert first[2:].tolist() == [2, 2, 3, 4]  # Padding before the start is not read either.


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_norm": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(tmp_path, options, tied):
    layout = make_layout(max_text=16, num_image_tokens=6)
    model = tiny_model(layout=layout, tie_word_embeddings=tied, **options)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["vocabulary"]["segments"]
    loaded = UnifiedTransformerModel.from_pretrained(tmp_path)
    canvas = make_canvas(FULL)
    assert torch.equal(run(loaded, canvas), run(model, canvas))
    assert loaded.vocabulary.to_dict() == tiny_vocabulary().to_dict()
    assert dict(loaded.layout) == layout
    assert not loaded.training
    low = UnifiedTransformerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}


def test_the_constructor_is_keyword_only():
    with pytest.raises(TypeError):
        UnifiedTransformerModel(tiny_vocabulary().to_dict())


def test_logits_are_those_of_one_modality():
    model, canvas = tiny_model(), make_canvas(FULL)
    states = run(model, canvas)
    text, image = (model.compute_logits(states, name) for name in ("text", "image"))
    assert (text.shape[-1], image.shape[-1]) == (24, 40)
    every = states @ model.embed_tokens.weight.t()
    assert torch.allclose(image, every[..., list(model.vocabulary.columns("image"))], atol=1e-5)
    picked = model.compute_logits(states[canvas.is_free], "text")
    assert torch.allclose(picked, text[canvas.is_free], atol=1e-5)
    with pytest.raises(VocabularyError, match="Did you mean `image`"):
        model.compute_logits(states, "images")


def test_embeddings_can_be_given():
    model, canvas = tiny_model(), make_canvas(FULL)
    inputs = {
        "noise_levels": noise_levels(canvas, model.vocabulary),
        "position_ids": canvas.position_ids,
        "attention_plan": AttentionPlan.from_canvas(canvas),
    }
    embedded = model(inputs_embeds=model.embed(canvas.input_ids), **inputs).hidden_states
    assert torch.equal(embedded, run(model, canvas))
    with pytest.raises(ConfigError, match="exactly one"):
        model(**inputs)


def test_gradient_checkpointing_gives_the_same_gradients():
    canvas = make_canvas(FULL)
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model().double().train()
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        run(model, canvas).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-12)


def test_blocks_trace_as_one_graph(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Checks do not trace.
    model, canvas = tiny_model(), make_canvas(FULL)
    with torch.no_grad():
        expected = run(model, canvas)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.allclose(run(model, canvas), expected, atol=1e-5)


def test_layerwise_casting_leaves_embedding_and_head_alone():
    model, canvas = tiny_model(tie_word_embeddings=False), make_canvas(FULL)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert model.blocks[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    assert model.embed_tokens.weight.dtype == model.head.weight.dtype == torch.float32
    with torch.no_grad():
        assert bool(run(model, canvas).isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 3}, "must divide `num_attention_heads`"),
        ({"num_attention_heads": 3}, "must divide `hidden_size`"),
        ({"axes_dims_rope": (8, 4)}, "sum 12 and 16"),
        ({"logits_shift": 2}, "must be 0 or 1"),
        ({"mlp_type": "moe"}, "must be `dense`"),
        ({"noise_conditioning": "adaln"}, "Unknown noise_conditioning"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(**options)


class TestAdapters:
    """LoRA through peft."""

    @pytest.fixture
    def lora(self):
        return pytest.importorskip("peft").LoraConfig

    def test_an_adapter_changes_the_output_and_trains(self, lora):
        model, canvas = tiny_model().train(), make_canvas(FULL)
        before = run(model, canvas).detach()
        targets = ["to_qkv", "to_out", "gate_up_proj", "down_proj"]
        model.add_adapter(lora(r=2, target_modules=targets, init_lora_weights=False))
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                states = run(model, canvas)
            assert not torch.allclose(states.float(), before, atol=0.1)
            model.zero_grad()
            states.float().square().mean().backward()
            trained = {
                n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
            }
            assert all("lora_" in name for name in trained)
            assert {name.split(".")[-4] for name in trained} == set(targets)

    @pytest.mark.parametrize("targets", [["to_qkv", "head"], ["embed_tokens"], "head|.*to_qkv"])
    def test_the_head_is_refused(self, lora, targets):
        with pytest.raises(ConfigError, match="may not hold `head`"):
            tiny_model().add_adapter(lora(r=2, target_modules=targets))

    def test_saving_the_head_beside_an_adapter_is_refused(self, lora):
        config = lora(r=2, target_modules=["to_qkv"], modules_to_save=["head"])
        with pytest.raises(ConfigError, match="modules_to_save"):
            tiny_model().add_adapter(config)


def test_axes_are_those_of_the_canvas():
    assert sum(AXES) == 16
    canvas = make_canvas(FULL)
    short = canvas.replace(position_ids=canvas.position_ids[..., :2])
    with pytest.raises(ConfigError, match="3 axes"):
        run(tiny_model(), short)
