"""What accelerate is told and may not decide: guards before and after an `Accelerator` is made.

accelerate gives a run its processes, devices and trackers. Everything that changes the result (data
order, precision, accumulation, sharding) is said in the run's own config, which a checkpoint
records; a launch file that says otherwise is refused, never ignored. `GUARDS` lists the settings.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.precision import Precision, bf16_support, resolve_precision, software_bf16
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.saving import recorded_precision

logger = logging.getLogger(__name__)

Environment = Mapping[str, str]
Guard = Callable[[TrainConfig, Environment], None]

BLOCK = "UnifiedTransformerBlock"


def open_accelerator(config: TrainConfig, environment: Environment = os.environ) -> Accelerator:
    """Check what the launcher has set, then make the accelerator of a run.

    Args:
        config: The run.
        environment: Variables that `accelerate launch` sets for its processes.

    Raises:
        ConfigError: When a guard refuses a setting.
    """
    for guard in GUARDS:
        guard(config, environment)
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=run_device(environment).type == "cpu",
        log_with="tensorboard",
        project_dir=str(Path(config.output_dir)),
    )
    check_accelerator(accelerator, environment)
    return accelerator


def run_device(environment: Environment = os.environ) -> torch.device:
    """Kind of device that a run of this machine trains on; never MPS, which has no float64."""
    is_cpu = _is_set(environment, "ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    found = None if is_cpu else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None or found.type == "mps" else found


def run_precision(config: TrainConfig, device: torch.device) -> Precision:
    """What a run computes in on a device: what it says, or for `auto` what it began with.

    A run that goes on is the run it was, wherever it goes on; only a new one asks the device.

    Args:
        config: The run; its `output_dir` may hold checkpoints.
        device: Of this process.
    """
    support = bf16_support(device)
    if config.mixed_precision == "auto":
        begun = recorded_precision(Path(config.output_dir))
        if begun is not None:
            return Precision(begun, f"auto: as the run began; {support.reason}")
    return resolve_precision(config.mixed_precision, support)


def settle_precision(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The config with its precision resolved, the same in every process, and logged.

    `auto` is `bf16` only if that is fast on the device of every process.

    Args:
        config: The run.
        accelerator: Of this process; every process must call.
    """
    precision = run_precision(config, accelerator.device)
    is_everywhere = "no" not in gather_object([precision.value])
    if precision.value == "bf16" and not is_everywhere:
        precision = Precision("no", "auto: bf16 is not fast on the device of every process")
    if accelerator.is_main_process:
        logger.info("mixed precision: %s", precision)
        problem = software_bf16(accelerator.device) if precision.value == "bf16" else None
        if problem is not None:
            logger.warning(
                "%s Set `mixed_precision` to `no`, and `allow_changes` if the run has checkpoints.",
                problem,
            )
    return replace(config, mixed_precision=precision.value)


def resolve_sharding(sharding: str, environment: Environment = os.environ) -> str:
    """`none`, `zero2` or `fsdp`: what the config says, or what the launch file says for `auto`.

    A launch file of `distributed_type: FSDP` means `fsdp`, or `zero2` when it sets
    `fsdp_reshard_after_forward: false`.

    Raises:
        ConfigError: When config and launch file disagree.
    """
    launched = None
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        keeps = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
        launched = "zero2" if keeps else "fsdp"
    if sharding == "auto":
        return launched or "none"
    if launched not in (None, sharding):
        raise ConfigError(
            f"`sharding` must agree with the accelerate config; got `{sharding}` and `{launched}`"
            " (`distributed_type: FSDP`). Set `sharding` to `auto`, or use a launch file of"
            " `distributed_type: MULTI_GPU`."
        )
    return sharding


# Before an accelerator is made.


def check_processes(config: TrainConfig, environment: Environment) -> None:
    """`accelerate launch` on the CPU starts one process, whatever `num_processes` says."""
    del config
    is_one = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    by_mpi = any(name.startswith(("PMI_", "OMPI_", "MV2_")) for name in environment)
    if is_one and "MASTER_PORT" in environment and not by_mpi:
        raise ConfigError(
            "`num_processes` of the accelerate config asks for several processes; accelerate"
            " started 1, as it does on the CPU. Launch with"
            " `configs/accelerate/cpu_2_processes.yaml`, with torchrun, or ask for 1."
        )


def check_precision(config: TrainConfig, environment: Environment) -> None:
    """Autocast is the trainer's; a precision in the launch file would be ignored without a word."""
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched == "no":
        return
    own = run_precision(config, run_device(environment))
    if launched != own.value:
        remedy = "`no`" if launched == "bf16" else "`no`: float16 and fp8 are not supported"
        reason = f" ({own.reason})" if own.reason else ""
        raise ConfigError(
            f"`mixed_precision` belongs to the run's config; got `{own.value}`{reason} there"
            f" and `{launched}` in the accelerate config. Set the latter to {remedy}, and"
            " `--mixed_precision bf16` for the run if you want it."
        )


def check_accumulation(config: TrainConfig, environment: Environment) -> None:
    """accelerate would divide the loss once more."""
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"`gradient_accumulation_steps` of the accelerate config must be 1; got {steps}. The"
            " trainer accumulates: give `data.batch_size` (rows of a step, over all processes) and"
            f" `data.micro_batch_size` (rows of a forward; {config.data.micro_batch_size} now)."
        )


def check_compilation(config: TrainConfig, environment: Environment) -> None:
    """accelerate would compile the whole model, and rename its weights."""
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ConfigError(
            f"`dynamo_backend` of the accelerate config must be `no`; got `{backend}`. Set"
            f" `compile_blocks` in the run's config ({config.compile_blocks} now)."
        )


def check_engine(config: TrainConfig, environment: Environment) -> None:
    """DeepSpeed and Megatron-LM bring a loop and checkpoints of their own."""
    del config
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_set(environment, f"ACCELERATE_USE_{engine}"):
            raise ConfigError(
                f"`distributed_type` must be MULTI_GPU or FSDP; got {engine}. Its engine steps"
                " inside backward and pickles its checkpoints, so a run could not be resumed bit"
                " for bit, nor read without running code. Use"
                " `configs/accelerate/8_gpu_zero2.yaml` (or `sharding: zero2`, or `fsdp`)."
            )


def check_fsdp(config: TrainConfig, environment: Environment) -> None:
    """FSDP settings that the trainer's own sharding does not follow."""
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        return
    resolve_sharding(config.sharding, environment)
    rules = {
        "fsdp_version": ("FSDP_VERSION", "1", "2", "Set it, or run `accelerate to-fsdp2`."),
        "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "false", "false", "Use more devices."),
        "fsdp_activation_checkpointing": (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "false",
            "false",
            "Set `gradient_checkpointing` in the run's config.",
        ),
        "fsdp_transformer_layer_cls_to_wrap": (
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            BLOCK,
            BLOCK,
            "Leave it out: the model names its blocks.",
        ),
    }
    for name, (variable, default, needed, remedy) in rules.items():
        value = environment.get(variable, default)
        if value != needed:
            raise ConfigError(
                f"`{name}` of the accelerate config must be {needed}; got {value}. {remedy}"
            )


def check_parallelism(config: TrainConfig, environment: Environment) -> None:
    """Tensor, context and replicated-shard parallelism would be ignored."""
    del config
    if _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError(
            "`parallelism_config` of the accelerate config must be absent; got one. Processes hold"
            " copies or shards of the model: set `sharding`."
        )


GUARDS: tuple[Guard, ...] = (
    check_processes,
    check_precision,
    check_accumulation,
    check_compilation,
    check_engine,
    check_fsdp,
    check_parallelism,
)


# After it is made, by `train` or by a caller of the trainer.


def check_accelerator(accelerator: Accelerator, environment: Environment = os.environ) -> None:
    """Refuse an accelerator that would change batches, precision, accumulation or the schedule.

    Where it sees no device, each of several processes believes that it is alone, trains on all the
    data and writes into the same folder.

    Raises:
        ConfigError: With the setting, its value and what to use instead.
    """
    loaders = "The trainer reads its own slice of every global batch"
    mine = "Leave it out"
    world = int(environment.get("WORLD_SIZE", "1"))
    alone = "Make it after the launcher, with `cpu=True` where there is no other device"
    rules = (
        ("num_processes", accelerator.num_processes, world, alone),
        ("mixed_precision", accelerator.mixed_precision, "no", "Set it in the run's config"),
        ("gradient_accumulation_steps", accelerator.gradient_accumulation_steps, 1, mine),
        ("split_batches", accelerator.split_batches, False, loaders),
        ("dispatch_batches", bool(accelerator.dispatch_batches), False, loaders),
        ("prepared loaders", len(accelerator._dataloaders), 0, loaders),
        ("prepared LR schedules", len(accelerator._schedulers), 0, "Set `lr_schedule`"),
    )
    for name, value, needed, remedy in rules:
        if value != needed:
            raise ConfigError(
                f"`{name}` of the accelerator must be `{needed}`; got `{value}`. {remedy}."
            )


def _is_set(environment: Environment, name: str) -> bool:
    return environment.get(name, "false").lower() == "true"
