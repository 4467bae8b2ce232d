"""AdamW with weight decay on weight matrices only."""

from torch import nn
from torch.optim import AdamW


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


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> AdamW:
    """Fused AdamW over the trainable parameters."""
    groups = parameter_groups(model, weight_decay)
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
