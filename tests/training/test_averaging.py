"""`export.average_with`: the mean of a run's weights and another backbone's."""

import dataclasses
from pathlib import Path

import pytest
import torch

from multimodal_dlm import load_pipeline
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import ExportConfig, LoRAConfig, ModelConfig, TrainConfig
from multimodal_dlm.training.run import describe, train
from tests.training.runs import final_tensors, run_config


@pytest.fixture(scope="module")
def before(run_root) -> str:
    config = run_config(run_root, "average_before", export=ExportConfig(dtype="float32"))
    return str(train(dataclasses.replace(config, seed=5))["export"])


def averaged(run_root, before: str, share: float) -> TrainConfig:
    export = ExportConfig(dtype="float32", average_with=before, average_share=share)
    config = run_config(run_root, "average_after", export=export)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=before))


def files(folder: str) -> dict[Path, int]:
    """When each file of a run's checkpoints was written."""
    found = (Path(folder) / "checkpoints").rglob("*")
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


def test_the_export_lies_between_both_and_another_share_needs_no_training(run_root, before):
    first = load_pipeline(before).transformer.state_dict()
    trained = []
    for share in (0.25, 0.0, 1.0):
        config = averaged(run_root, before, share)
        result = train(config)
        trained.append(files(config.output_dir))
        assert trained[-1] == trained[0]
        found = load_pipeline(result["export"]).transformer.state_dict()
        own = {name[4:]: t for name, t in final_tensors(config).items() if name[:4] == "ema/"}
        assert found.keys() == own.keys() == first.keys()
        assert any(not torch.equal(first[name], own[name]) for name in own)
        for name, weight in found.items():
            expected = first[name].double() + share * (own[name].double() - first[name].double())
            assert torch.allclose(weight.double(), expected, rtol=1e-6, atol=1e-7), name


def test_the_mean_is_taken_before_weights_are_rounded(run_root, before):
    config = averaged(run_root, before, 0.25)
    export = dataclasses.replace(config.export, dtype="bfloat16")
    result = train(dataclasses.replace(config, export=export))
    found = load_pipeline(result["export"]).transformer.state_dict()
    own = {name[4:]: t for name, t in final_tensors(config).items() if name[:4] == "ema/"}
    first = load_pipeline(before).transformer.state_dict()
    exact = {name: first[name].lerp(own[name], 0.25).bfloat16() for name in own}
    different = sum(int((found[name].bfloat16() != exact[name]).sum()) for name in own)
    assert different < sum(weight.numel() for weight in own.values()) / 1000  # Ties of rounding.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"num_layers": 3}}, "got `num_layers` 3 and 2 there"),
        ({"max_text": 24}, "got `layout.max_window.text` 24 and 20 there"),
    ],
)
def test_backbones_of_other_configs_are_refused_before_training(run_root, before, changes, message):
    config = averaged(run_root, before, 0.5)
    model = dataclasses.replace(config.model, init_from=None, **changes)
    with pytest.raises(ConfigError, match=f"run's own config; {message}"):
        build_job(dataclasses.replace(config, model=model))


def test_what_cannot_be_averaged_is_refused_before_training(run_root, before):
    config = averaged(run_root, before, 0.5)
    for changes, message in (
        ({"average_with": before + "/none"}, "`export.average_with` must be a folder; there is no"),
        ({"folder": before + "/../pipeline"}, "must not be the folder of the export; got"),
    ):
        export = dataclasses.replace(config.export, **changes)
        with pytest.raises(ConfigError, match=message):
            describe(dataclasses.replace(config, export=export))
    with pytest.raises(ConfigError, match=r"`export.average_share` must lie in \[0, 1\]; got 1.5"):
        dataclasses.replace(config, export=ExportConfig(average_share=1.5))
    with pytest.raises(ConfigError, match="needs `model.component` `transformer`; got"):
        dataclasses.replace(config, model=ModelConfig(component="image_tokenizer"))
    with pytest.raises(ConfigError, match="`export.average_with` needs whole weights"):
        dataclasses.replace(config, lora=LoRAConfig(rank=2))


def test_a_merged_adapter_is_averaged(run_root, before):
    pytest.importorskip("peft")
    config = averaged(run_root, before, 0.0)
    config = dataclasses.replace(
        config,
        output_dir=config.output_dir + "_lora",
        lora=LoRAConfig(rank=2, merge=True),
    )
    found = load_pipeline(train(config)["export"]).transformer.state_dict()
    first = load_pipeline(before).transformer.state_dict()
    assert all(torch.equal(weight, first[name]) for name, weight in found.items())
