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


def test_the_export_lies_between_both_and_another_share_needs_no_training(run_root, before):
    first = load_pipeline(before).transformer.state_dict()
    for share in (0.25, 0.0, 1.0):
        config = averaged(run_root, before, share)
        result = train(config)  # The second and third time there is nothing left to train.
        found = load_pipeline(result["export"]).transformer.state_dict()
        own = {name[4:]: t for name, t in final_tensors(config).items() if name[:4] == "ema/"}
        assert found.keys() == own.keys() == first.keys()
        assert any(not torch.equal(first[name], own[name]) for name in own)
        for name, weight in found.items():
            expected = first[name].double() + share * (own[name].double() - first[name].double())
            assert torch.allclose(weight.double(), expected, rtol=1e-6, atol=1e-7), name


def test_what_cannot_be_averaged_is_refused_before_training(run_root, before):
    config = averaged(run_root, before, 0.5)
    others = dataclasses.replace(config.model, init_from=None, options={"num_layers": 3})
    with pytest.raises(ConfigError, match="run's own config; got `num_layers` 3 and 2 there"):
        build_job(dataclasses.replace(config, model=others))
    nowhere = dataclasses.replace(config.export, average_with=str(Path(before) / "none"))
    with pytest.raises(ConfigError, match="`export.average_with` must be a folder; there is no"):
        describe(dataclasses.replace(config, export=nowhere))
    with pytest.raises(ConfigError, match=r"`export.average_share` must lie in \[0, 1\]; got 1.5"):
        dataclasses.replace(config, export=ExportConfig(average_share=1.5))
    for changes in (
        {"model": ModelConfig(component="image_tokenizer")},
        {"lora": LoRAConfig(rank=2)},
    ):
        with pytest.raises(ConfigError, match="`export.average_with` needs a whole backbone"):
            dataclasses.replace(config, **changes)


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
