"""AdamW with weight decay on weight matrices only, and Muon for the hidden ones."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from multimodal_dlm.errors import ConfigError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices called `weight` with decay; norms, biases and tables without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.split(".")[-1] == "weight"
            (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> Iterator[Tensor]:
    """Trainable weights of the linear layers inside a model's repeated blocks, in their order."""
    repeated = getattr(model, "_repeated_blocks", None) or ()
    for block in model.modules():
        if type(block).__name__ in repeated:
            for layer in block.modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    yield layer.weight


class MuonWithAdamW(Optimizer):
    """Muon for the hidden matrices of a backbone, AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) steps along the orthogonalized
    momentum: all directions of a matrix learn at one rate, so that what is rare in the data is not
    drowned by what is frequent. An update has the root mean square that one of AdamW typically
    has (arXiv 2502.16982, section 2.2), so that learning rate and weight decay mean the same.

    Args:
        muon: Optimizer of the hidden matrices.
        adamw: Optimizer of the rest.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:  # State and groups are new objects once a checkpoint is loaded.
            entry = "ns_steps" if isinstance(part, Muon) else "betas"
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if entry in group]
            part.step()
        return loss


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum: float = 0.95,
) -> Optimizer:
    """Fused AdamW over the trainable parameters, or Muon with AdamW.

    Raises:
        ConfigError: When the name is another, or Muon has no whole matrix to step.
    """
    if name not in ("adamw", "muon"):
        raise ConfigError(f"`optimizer.name` must be `adamw` or `muon`; got `{name}`.")
    groups = parameter_groups(model, weight_decay)
    adam = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "fused": True}
    if name == "adamw":
        return AdamW(groups, **adam)
    hidden = list(hidden_matrices(model))
    if not hidden or any(isinstance(matrix, DTensor) for matrix in hidden):
        raise ConfigError(
            "`optimizer.name` `muon` needs whole matrices in repeated blocks; this component has"
            " none, or they lie in shards. Use `adamw`, or `sharding: none`."
        )
    mine = {id(matrix) for matrix in hidden}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in mine]  # type: ignore
    rest = [group for group in groups if group["params"]]
    muon = Muon(
        hidden,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, AdamW(rest, **adam))
