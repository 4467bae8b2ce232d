"""How a model is held by the processes of a run: whole in each, or in shards.

`none`   every process holds everything; gradients are averaged (DDP).
`zero2`  weights, gradients, optimizer and averaged weights lie in shards; a micro-batch gathers the
         weights once and keeps them until its backward is over (the traffic of ZeRO-2: Rajbhandari
         et al. 2020, arXiv 1910.02054, section 7.2.1).
`fsdp`   the same shards; a block's weights are gathered for its forward and again for its backward
         (ZeRO-3; Zhao et al. 2023, arXiv 2304.11277).

Shards are PyTorch's `fully_shard` on every device, so a test on two CPU processes runs what a
cluster runs; accelerate's own FSDP plugin would silently become DDP there. Checkpoints, sample
sheets and exports see whole tensors, so a run goes on under any sharding and number of processes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.lora import empty_copy
from multimodal_dlm.training.shards import whole_tensors

BuildOptimizer = Callable[[nn.Module], Optimizer]


class ReplicatedModel:
    """A whole model in every process; in one process, nothing but the model.

    Args:
        model: Trained component; moved to the process's device.
        build_optimizer: Makes the optimizer of the parameters as they are held.
        accelerator: Of this process.
    """

    def __init__(
        self, model: Any, build_optimizer: BuildOptimizer, accelerator: Accelerator
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.wrapper: Any = self._spread()
        self.optimizer = build_optimizer(model)
        check_optimizer(model, self.optimizer)

    def _spread(self) -> nn.Module:
        """What is called to run the forward."""
        return self.accelerator.prepare(self.model)

    def accumulating(self) -> AbstractContextManager[Any]:
        """Around a micro-batch that is not the last of its step: gradients stay where they are."""
        return self.accelerator.no_sync(self.wrapper)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm; return the norm they had.

        accelerate's own function returns a shard's share of the norm for sharded parameters.
        """
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def gathered(
        self, ema: ExponentialMovingAverage | None
    ) -> tuple[Any, ExponentialMovingAverage | None]:
        """The model and its averaged weights whole, for one process to use alone.

        Every process takes part; only the main one may use the result.
        """
        return self.model, ema


class ShardedModel(ReplicatedModel):
    """A model whose every parameter is cut along its first dimension, a piece in each process.

    One unit per repeated block and one for the rest. The rest stays gathered from forward to
    backward, so `compute_logits` needs no hook of its own: with one, a process whose micro-batch
    has no target of some modality would exchange fewer messages than the others, and all would wait
    for ever.

    Args:
        model: Trained component, equal in every process.
        build_optimizer: Makes the optimizer of the sharded parameters.
        accelerator: Of this process.
        sharding: `zero2` or `fsdp`.
        mixed_precision: With `bf16` the blocks' weights travel in bf16 and their gradients are
            added in float32; the rest, which holds the token embeddings, travels in float32.
    """

    def __init__(
        self,
        model: Any,
        build_optimizer: BuildOptimizer,
        accelerator: Accelerator,
        *,
        sharding: str,
        mixed_precision: str,
    ) -> None:
        self.sharding, self.mixed_precision = sharding, mixed_precision
        super().__init__(model, build_optimizer, accelerator)

    def _spread(self) -> nn.Module:
        blocks = repeated_blocks(self.model)
        check_same_start(self.model)
        device, world = self.accelerator.device.type, self.accelerator.num_processes
        mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        kind = torch.bfloat16 if self.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(
            param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=self.sharding == "fsdp",
                mp_policy=policy,
            )
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
        check_sharded(self.model)
        return self.model

    def accumulating(self) -> AbstractContextManager[Any]:
        """Gradients are added shard by shard after every micro-batch: none is ever kept whole."""
        return nullcontext()

    def gathered(
        self, ema: ExponentialMovingAverage | None
    ) -> tuple[Any, ExponentialMovingAverage | None]:
        """A whole copy on the main process's device; (None, None) elsewhere."""
        is_main = self.accelerator.is_main_process
        weights = whole_tensors(self.model.state_dict(), keep=is_main)
        averages = ema.gathered(keep=is_main) if ema is not None else None
        if not is_main:
            return None, None
        copy = empty_copy(self.model)
        copy.load_state_dict(weights)
        return copy.to(self.accelerator.device), averages


def spread_model(
    model: nn.Module,
    build_optimizer: BuildOptimizer,
    accelerator: Accelerator,
    *,
    sharding: str,
    mixed_precision: str,
) -> ReplicatedModel:
    """Hold a model the way the run asks for; one process always holds it whole.

    Args:
        model: Trained component on the CPU, equal in every process.
        build_optimizer: Makes the optimizer.
        accelerator: Of this process.
        sharding: `none`, `zero2` or `fsdp`.
        mixed_precision: `bf16` or `no`.
    """
    if sharding == "none" or accelerator.num_processes == 1:
        return ReplicatedModel(model, build_optimizer, accelerator)
    return ShardedModel(
        model, build_optimizer, accelerator, sharding=sharding, mixed_precision=mixed_precision
    )


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that become units of their own.

    Raises:
        ConfigError: When the model names none.
    """
    names = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"`sharding` needs a model that names its repeated blocks; got {type(model).__name__}."
            " Set `sharding` to `none`: a model of this kind fits into every process."
        )
    return blocks


def check_same_start(model: nn.Module) -> None:
    """Refuse processes that would each contribute a piece of another model.

    Raises:
        ConfigError: When a tensor's sum differs between processes.
    """
    sums = {name: float(tensor.double().sum()) for name, tensor in model.state_dict().items()}
    for rank, other in enumerate(gather_object([sums])):
        different = [name for name in sums if sums[name] != other.get(name)]
        if different:
            raise ConfigError(
                f"`model` must start with equal weights in every process; `{different[0]}` sums to"
                f" {sums[different[0]]} here and {other.get(different[0])} in process {rank}. Give"
                " every process the same `seed` and the same folder `model.init_from`."
            )


def check_sharded(model: nn.Module) -> None:
    """Refuse a model that is still whole: a launcher fell back to copies without a word.

    Raises:
        ConfigError: When a parameter is no shard.
    """
    whole = [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
    if whole:
        raise ConfigError(
            f"`sharding` must cut every parameter; `{whole[0]}` is whole. Do not wrap the model"
            " before the trainer does."
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that was made before the model was cut: it would step stale tensors.

    Raises:
        ConfigError: When it holds a tensor that is no parameter of the model.
    """
    held = {id(parameter) for parameter in model.parameters()}
    stale = sum(id(p) not in held for group in optimizer.param_groups for p in group["params"])
    if stale:
        raise ConfigError(
            f"The optimizer must hold the model's parameters; {stale} of its tensors are not. Build"
            " it after the model has been spread."
        )


def check_rows(rows: Mapping[int, list[int]] | list[list[int]], batch_size: int) -> None:
    """Refuse a step in which the processes together do not see each row of the batch once.

    Args:
        rows: Rows of the global batch that each process holds.
        batch_size: Rows of the global batch.

    Raises:
        ConfigError: When a row is missing or seen twice.
    """
    parts = rows.values() if isinstance(rows, Mapping) else rows
    seen = sorted(row for part in parts for row in part)
    if seen != list(range(batch_size)):
        raise ConfigError(
            f"`data.batch_size` rows must be seen once in every step, by all processes together;"
            f" got {len(seen)} rows, {len(set(seen))} of them different, of {batch_size}. Do not"
            " pass a loader or a source through `accelerator.prepare`."
        )
