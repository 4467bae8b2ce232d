"""Ideas of Diffusers' published pipeline tests that the common contract does not cover already.

`docs/diffusers_contract.md` lists all of them, with the test of ours that answers each.
"""

import inspect
import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from torch import nn

from multimodal_dlm.errors import CanvasError, ConfigError
from multimodal_dlm.pipelines import (
    UnifiedInpaintPipeline,
    UnifiedTextToImagePipeline,
    load_pipeline,
)
from multimodal_dlm.schedulers import AbsorbingAncestralScheduler
from tests.pipelines.registry import CASES, plain, same
from tests.pipelines.tiny import seeded, tiny_components

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.pipeline.__name__)

COMMON = {
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
}


def draw(pipe, **changed):
    arguments = {"num_inference_steps": 4, "output_type": "codes", "generator": seeded(0)}
    return pipe("a red apple", **{**arguments, **changed}).images[0]


@pytest.fixture
def own():
    """A pipeline whose components no other test shares."""
    made = UnifiedTextToImagePipeline(**tiny_components())
    made.set_progress_bar_config(disable=True)
    return made


def reload(folder, **options):
    loaded = load_pipeline(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# Signatures and components.


@every_case
def test_call_takes_the_usual_optional_arguments(case):
    parameters = inspect.signature(case.pipeline.__call__).parameters
    assert set(parameters) >= COMMON
    assert all(parameters[name].default is not inspect.Parameter.empty for name in COMMON)


@every_case
def test_components_build_the_pipeline_again(make, case):
    pipe = make(case.pipeline)
    again = case.pipeline(**pipe.components)
    assert again.components == pipe.components
    assert pipe.parameters == {}


def test_another_scheduler_is_saved_and_loaded(own, tmp_path):
    before = draw(own)
    own.scheduler = AbsorbingAncestralScheduler.from_config(own.scheduler.config)
    after = draw(own)
    assert not torch.equal(before, after)
    own.save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert type(loaded.scheduler) is AbsorbingAncestralScheduler
    assert torch.equal(draw(loaded), after)


def test_component_given_by_name_takes_the_place_of_the_saved_one(own, tmp_path):
    own.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, transformer=own.transformer)
    assert loaded.transformer is own.transformer
    assert loaded.image_tokenizer is not own.image_tokenizer


# Dtypes and files.


def test_dtype_may_be_given_per_component(own, tmp_path):
    own.save_pretrained(tmp_path)
    loaded = load_pipeline(
        tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.image_tokenizer.dtype == torch.float32


def test_weights_saved_in_bfloat16_load_as_float32_unless_asked(own, tmp_path):
    own.to(torch.bfloat16)
    own.save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).transformer.dtype == torch.float32
    assert load_pipeline(tmp_path, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_to_dtype_casts_every_model(own):
    own.to(torch.float64)
    models = [each for each in own.components.values() if isinstance(each, nn.Module)]
    assert len(models) == 2
    assert all(p.dtype == torch.float64 for model in models for p in model.parameters())


def test_half_precision_leaves_no_nan(own):
    own.to(torch.bfloat16)
    pixels = own("a red apple", num_inference_steps=3, output_type="pt", generator=seeded(0)).images
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()


def test_variants_are_saved_and_loaded(own, tmp_path):
    own.save_pretrained(tmp_path, variant="bf16")
    names = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert names == ["diffusion_pytorch_model.bf16.safetensors"] * 2
    assert torch.equal(draw(reload(tmp_path, variant="bf16")), draw(own))
    with pytest.raises(ValueError, match="variant=fp16"):
        load_pipeline(tmp_path, variant="fp16")


def test_shards_are_saved_and_loaded(own, tmp_path):
    own.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(draw(reload(tmp_path)), draw(own))


# Callbacks.


@every_case
def test_tensors_a_callback_returns_take_effect(make, case):
    """In the last step every free position is overwritten with its modality's third value."""
    pipe = make(case.pipeline)
    vocabulary = pipe.transformer.vocabulary
    text, image = vocabulary.columns("text").start + 2, vocabulary.columns("image").start + 2
    start = {}

    def callback(pipe, step, timestep, tensors):
        ids = tensors["input_ids"]
        masked = vocabulary.is_masked(ids)
        start.setdefault("free", masked.clone())
        if masked.any():
            return tensors
        in_text = ids < vocabulary.columns("text").stop
        third = torch.where(in_text, text, image)
        return {"input_ids": torch.where(start["free"], third, ids)}

    arguments = {**case.arguments(0), **case.plain, "guidance_scale": 1.0}
    output = pipe(**arguments, generator=seeded(0), callback_on_step_end=callback)
    rows = [part for part in plain(output) if isinstance(part, torch.Tensor)]
    assert sum(int((part == 2).sum()) for part in rows) >= int(start["free"].sum())


# Toolbox: what Diffusers' mixins give must work through the pipeline or say why not.


def test_layerwise_casting_runs(own):
    own.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert own.transformer.embed_tokens.weight.dtype == torch.float32
    assert any(p.dtype == torch.bfloat16 for p in own.transformer.parameters())
    assert draw(own).shape == (1, 4, 4)


def test_attention_backends_give_the_same_ids(own):
    expected = draw(own)
    for backend in ("eager", "native"):
        own.transformer.set_attention_backend(backend)
        assert torch.equal(draw(own), expected)


def test_offload_to_the_cpu_needs_an_accelerator(own):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        own.enable_model_cpu_offload()


def test_lora_adapter_changes_the_result_and_can_be_saved_and_switched_off(own, tmp_path):
    peft = pytest.importorskip("peft")
    before = draw(own)
    own.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_out"], init_lora_weights=False), "extra"
    )
    with torch.no_grad():
        for name, weight in own.transformer.named_parameters():
            if "lora" in name:
                nn.init.normal_(weight, std=1.0, generator=torch.Generator().manual_seed(0))
    changed = draw(own)
    assert not torch.equal(before, changed)
    own.transformer.save_lora_adapter(tmp_path, adapter_name="extra")
    own.transformer.disable_adapters()
    assert torch.equal(draw(own), before)
    fresh = UnifiedTextToImagePipeline(**tiny_components())
    fresh.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.transformer.load_lora_adapter(
            tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
    assert torch.equal(draw(fresh), changed)


def test_diffusers_caches_that_need_more_than_one_context_are_given_it(own):
    """Every forward is inside `cache_context` with the names of its branches."""
    seen = []
    enter = type(own.transformer).cache_context

    class Recording(type(own.transformer)):
        def cache_context(self, name):
            seen.append(name)
            return enter(self, name)

    own.transformer.__class__ = Recording
    HookRegistry.check_if_exists_or_initialize(own.transformer)
    draw(own)
    assert seen == ["cond+uncond"] * 4
    assert own.num_forwards == 2 * len(seen)


@every_case
def test_progress_bar_setting_outlives_a_call(make, case):
    pipe = make(case.pipeline)
    pipe(**{**case.arguments(0), **case.plain})
    assert pipe._progress_bar_config == {"disable": True}


@every_case
def test_two_calls_of_one_pipeline_do_not_depend_on_each_other(make, case):
    pipe = make(case.pipeline)
    first = pipe(**{**case.arguments(0), **case.plain}, generator=seeded(0))
    pipe(**{**case.arguments(1), **case.plain}, generator=seeded(5))
    again = pipe(**{**case.arguments(0), **case.plain}, generator=seeded(0))
    assert same(first, again)


# Caches of Diffusers.


def holes(pipe):
    """Two pictures with one hole and with many: the first row is finished long before the other."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :8, :8] = 1
    masks[1] = 1
    return {"prompt": ["a red apple"] * 2, "image": pixels, "mask_image": masks}


def test_a_cache_of_diffusers_serves_rows_that_finish_at_different_times():
    """A threshold of 0 reuses nothing, so that the ids are those without a cache."""
    pipe = UnifiedInpaintPipeline(**tiny_components(num_layers=3))
    pipe.set_progress_bar_config(disable=True)
    options = {**holes(pipe), "num_inference_steps": 6, "output_type": "codes"}
    expected = pipe(**options, generator=seeded(0, 1)).images[0]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    found = pipe(**options, generator=seeded(0, 1)).images[0]
    assert torch.equal(found, expected)


def test_a_likelihood_is_refused_beside_a_cache_of_diffusers(own):
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ConfigError, match="`score` needs a forward that computes everything"):
        own.score("unconditional_text", text="a red apple")


# Callbacks.


def test_a_callback_that_writes_in_place_changes_what_the_next_step_sees(own):
    """What it returns counts, whether it is the same tensor or another; what it keeps does not."""
    image = own.processor.text_to_image(["a"]).window_slice(1)
    mask = own.transformer.vocabulary.mask_token_id("image")

    def erase(tensors, copies):
        ids = tensors["input_ids"].clone() if copies else tensors["input_ids"]
        ids[:, image] = mask
        return {"input_ids": ids}

    def once(copies):
        return lambda pipe, step, time, tensors: erase(tensors, copies) if step == 1 else {}

    drawn = [draw(own, callback_on_step_end=once(copies)) for copies in (False, True)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], draw(own))
    silent = draw(own, callback_on_step_end=lambda p, s, t, x: erase(x, False) and {})
    assert torch.equal(silent, draw(own))
    with pytest.raises(CanvasError, match="free positions only"):
        draw(own, callback_on_step_end=lambda p, s, t, x: {"input_ids": x["input_ids"].fill_(5)})
