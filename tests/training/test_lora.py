"""Adapters: only they train, a resume is exact, the export loads in Diffusers, merged or not."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import load_pipeline
from multimodal_dlm.training.checkpoint import latest_checkpoint, load_checkpoint
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import ExportConfig, LoRAConfig, ModelConfig, TrainConfig
from multimodal_dlm.training.packing import canvas_states
from multimodal_dlm.training.run import describe, train
from tests.training.runs import Stop, crash_at, final_tensors, run_config

pytest.importorskip("peft")
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(run_root) -> Path:
    """A trained pipeline in float32."""
    config = run_config(run_root, "lora_base", export=ExportConfig(dtype="float32"))
    return Path(train(config)["export"])


def lora_config(root: Path, base: Path, output: str, **changes) -> TrainConfig:
    options = {"rank": 3, "alpha": 6.0} | changes.pop("lora", {})
    return run_config(
        root, output, lora=LoRAConfig(**options), export=ExportConfig(dtype="float32"),
        model=ModelConfig(init_from=str(base), max_text=20, unconditional_text=4), **changes,
    )  # fmt: skip


def states(model, config) -> torch.Tensor:
    """Hidden states of real rows."""
    canvas = build_job(config).source.batches(0)[0].inputs
    with torch.no_grad():
        return canvas_states(model.eval(), canvas, noise_levels(canvas, model.vocabulary))[0]


def test_only_adapters_train_and_a_resume_is_exact(run_root, base):
    straight = lora_config(run_root, base, "lora_straight")
    broken = lora_config(run_root, base, "lora_broken", sample_every_steps=1)
    train(straight)
    with pytest.raises(Stop):
        train(broken, callbacks=[crash_at(5)])
    train(broken)
    left, right = final_tensors(straight), final_tensors(broken)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    before = load_pipeline(base).transformer.state_dict()
    moved = {name for name in left if name.startswith("model/")}
    frozen = {name for name in moved if "lora_" not in name}
    for name in frozen:
        old = before[name.removeprefix("model/").replace(".base_layer", "")]
        assert torch.equal(left[name], old), name
    adapters = moved - frozen
    assert len(adapters) == 2 * 4 * 2  # A and B, of four layers, in two blocks.
    assert all(bool(left[name].any()) for name in adapters)  # B has left zero.
    trained = {name.split("//")[0] for name in left if name.startswith("optimizer/")}
    assert {name.replace("optimizer/", "model/") for name in trained} == adapters
    assert describe(straight)["num_parameters"] == sum(left[name].numel() for name in adapters)


def test_the_exported_adapter_loads_in_diffusers(run_root, base):
    config = lora_config(run_root, base, "lora_export")
    folder = Path(train(config)["export"])
    assert [path.name for path in folder.iterdir()] == [LORA_FILE]
    with safe_open(folder / LORA_FILE, "pt") as file:
        assert all(name.startswith("transformer.") for name in file.keys())
        assert '"transformer.lora_alpha": 6.0' in file.metadata()["lora_adapter_metadata"]
    pipe = load_pipeline(base)
    plain = states(pipe.transformer, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer.load_lora_adapter(folder, weight_name=LORA_FILE)
    found = states(pipe.transformer, config)
    assert torch.equal(found, states(averaged(config), config))
    assert not torch.allclose(found, plain, atol=1e-3)
    pipe.transformer.disable_adapters()
    # Layers with an adapter, enabled or not, do not run on the kernels that `plain` came from.
    assert torch.allclose(states(pipe.transformer, config), plain, rtol=1e-5, atol=1e-5)


def averaged(config: TrainConfig):
    """The run's model with the averaged weights of its last checkpoint."""
    model = build_job(config).model
    path = latest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert path is not None
    model.load_state_dict(load_checkpoint(path).tensors["ema"])
    return model


def test_a_merged_export_is_a_pipeline_without_adapters(run_root, base):
    config = lora_config(run_root, base, "lora_merged", lora={"merge": True})
    folder = train(config)["export"]
    pipe = load_pipeline(folder)
    assert not any("lora" in name for name in pipe.transformer.state_dict())
    expected = states(averaged(config), config)
    assert torch.allclose(states(pipe.transformer, config), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["head", "embed_tokens"])
def test_head_and_embedding_are_refused(run_root, base, target):
    config = lora_config(run_root, base, "lora_head", lora={"target_modules": ("to_out", target)})
    with pytest.raises(ConfigError, match="may not hold `head` or `embed_tokens`"):
        build_job(config)


def test_unknown_targets_and_a_missing_base_are_refused(run_root, base):
    config = lora_config(run_root, base, "lora_none", lora={"target_modules": ("nothing",)})
    with pytest.raises(ConfigError, match=r"`lora.target_modules`: .*nothing"):
        build_job(config)
    with pytest.raises(ConfigError, match="needs a trained backbone in `model.init_from`"):
        dataclasses.replace(config, model=ModelConfig())
