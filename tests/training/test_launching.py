"""What accelerate may not decide is refused, by name, before or after an `Accelerator` is made."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training import launching, sharding
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.launching import (
    GUARDS,
    check_accelerator,
    open_accelerator,
    resolve_sharding,
)
from multimodal_dlm.training.sharding import (
    check_optimizer,
    check_rows,
    check_same_start,
    check_sharded,
    repeated_blocks,
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED = {
    "check_processes": (
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"},
        r"`num_processes` .* several processes; accelerate started 1.*cpu_2_processes",
    ),
    "check_precision": (
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        r"`mixed_precision` .* got `no` there and `fp16`.*float16 and fp8 are not supported",
    ),
    "check_accumulation": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        r"`gradient_accumulation_steps` .* must be 1; got 4.*`data.micro_batch_size`",
    ),
    "check_compilation": (
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        r"`dynamo_backend` .* must be `no`; got `INDUCTOR`. Set `compile_blocks`",
    ),
    "check_engine": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        r"`distributed_type` must be MULTI_GPU or FSDP; got DEEPSPEED.*8_gpu_zero2.yaml",
    ),
    "check_fsdp": (
        {"ACCELERATE_USE_FSDP": "true"},
        r"`fsdp_version` .* must be 2; got 1.*to-fsdp2",
    ),
    "check_parallelism": (
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        r"`parallelism_config` .* must be absent; got one.*`sharding`",
    ),
}


def config(**changes) -> TrainConfig:
    return TrainConfig(output_dir="out", num_train_steps=1, mixed_precision="no", **changes)


def test_every_guard_is_tried():
    assert [guard.__name__ for guard in GUARDS] == list(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_guard_refuses(name):
    environment, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        open_accelerator(config(), environment)
    guards = {guard.__name__: guard for guard in GUARDS}
    others = [guard for other, guard in guards.items() if other != name]
    for guard in others:
        guard(config(), environment)


def test_a_plain_launch_passes_every_guard():
    launched = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_USE_CPU": "True",
    }
    several = launched | {"MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    for environment in ({}, launched, several, launched | FSDP):
        refused = []
        for guard in GUARDS:
            try:
                guard(config(), environment)
            except ConfigError as error:
                refused.append((guard.__name__, str(error)))
        assert refused == []


def test_precisions_that_agree_pass():
    run = TrainConfig(output_dir="out", num_train_steps=1, mixed_precision="bf16")
    for guard in GUARDS:
        guard(run, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(ConfigError, match="got `no` there and `bf16`"):
        open_accelerator(config(), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true", "`fsdp_offload_params` .* must be false; got true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "Set `gradient_checkpointing`"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer", "got BertLayer. Leave it out"),
    ],
)
def test_fsdp_settings_that_would_be_ignored_are_refused(variable, value, message):
    with pytest.raises(ConfigError, match=message):
        open_accelerator(config(), FSDP | {variable: value})


def test_sharding_is_said_once():
    zero2 = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert resolve_sharding("auto", {}) == "none"
    assert resolve_sharding("auto", FSDP) == "fsdp"
    assert resolve_sharding("auto", zero2) == "zero2"
    assert resolve_sharding("zero2", zero2) == resolve_sharding("zero2", {}) == "zero2"
    with pytest.raises(ConfigError, match="must agree.*got `none` and `fsdp`"):
        open_accelerator(config(sharding="none"), FSDP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "bf16"}, "`mixed_precision` of the accelerator must be `no`"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` .* be `1`; got `2`"),
        (
            {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=3)},
            "`gradient_accumulation_steps` .* be `1`; got `3`",
        ),
        (
            {"dataloader_config": DataLoaderConfiguration(split_batches=True)},
            "`split_batches` .* be `False`; got `True`. The trainer reads its own slice",
        ),
        (
            {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)},
            "`dispatch_batches` .* be `False`; got `True`",
        ),
    ],
)
def test_an_accelerator_that_changes_the_run_is_refused(options, message):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        with pytest.raises(ConfigError, match=message):
            check_accelerator(Accelerator(cpu=True, **options))
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
    check_accelerator(Accelerator(mixed_precision="no", cpu=True))


def test_a_prepared_loader_or_schedule_is_refused():
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    accelerator.prepare(DataLoader([1, 2, 3]))
    with pytest.raises(ConfigError, match="`prepared loaders` .* got `1`"):
        check_accelerator(accelerator)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))
    with pytest.raises(ConfigError, match="`prepared LR schedules` .* got `1`. Set `lr_schedule`"):
        check_accelerator(accelerator)


def test_processes_that_believe_they_are_alone_are_refused():
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    with pytest.raises(
        ConfigError, match="`num_processes` of the accelerator must be `2`; got `1`"
    ):
        check_accelerator(accelerator, {"WORLD_SIZE": "2"})


def test_rows_seen_twice_or_never_are_refused():
    check_rows([[2, 0], [1, 3]], 4)
    for rows in ([[0, 1], [0, 1]], [[0, 1], [2]], [[0, 1, 2, 3], [3]]):
        with pytest.raises(ConfigError, match="`data.batch_size` rows must be seen once"):
            check_rows(rows, 4)


def test_an_optimizer_of_other_tensors_is_refused():
    model = nn.Linear(2, 2)
    check_optimizer(model, torch.optim.SGD(model.parameters()))
    stale = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ConfigError, match="must hold the model's parameters; 2 of its tensors"):
        check_optimizer(model, stale)


def test_a_model_that_stayed_whole_is_refused():
    with pytest.raises(ConfigError, match="must cut every parameter; `weight` is whole"):
        check_sharded(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="names its repeated blocks; got Linear"):
        repeated_blocks(nn.Linear(2, 2))


def test_processes_that_start_apart_are_refused(monkeypatch):
    model = nn.Linear(2, 2, bias=False)
    check_same_start(model)
    monkeypatch.setattr(
        "multimodal_dlm.training.sharding.gather_object", lambda own: [*own, {"weight": 9.0}]
    )
    with pytest.raises(ConfigError, match="`weight` sums to .* here and 9.0 in process 1"):
        check_same_start(model)


def test_the_tests_run_without_a_launcher():
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_the_page_names_every_guard():
    page = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    checks = {name for module in (launching, sharding) for name in vars(module)}
    names = {name for name in checks if name.startswith("check_")} | {"resolve_sharding"}
    assert len(names) > 11
    assert all(f"`{name}`" in page for name in names)
