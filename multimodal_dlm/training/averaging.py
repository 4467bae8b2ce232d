"""The mean of a trained backbone and another, such as the one before a stage.

A stage that is about one task takes something from the others; a mean of the weights before and
after it often keeps most of both (Wortsman et al. 2022, arXiv 2109.01903, section 3).
"""

from collections.abc import Mapping
from typing import Any

import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.training.config import config_changes, plain


@torch.no_grad()
def average(
    transformer: UnifiedTransformerModel, other: UnifiedTransformerModel, share: float
) -> None:
    """Replace the weights w of a backbone by share * w + (1 - share) * w of another.

    Args:
        transformer: Changed in place; float32.
        other: Of the same config; float32.
        share: In [0, 1]; 1 changes nothing.
    """
    others = other.state_dict()
    for name, weight in transformer.state_dict().items():
        if weight.is_floating_point():
            weight.lerp_(others[name], 1 - share)


def check_same(config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse to average backbones of different configs.

    Args:
        config: Of the run's backbone.
        other: Of the one it is averaged with.

    Raises:
        ConfigError: When an entry differs.
    """
    ours, theirs = (
        {name: plain(value) for name, value in each.items() if not name.startswith("_")}
        for each in (config, other)
    )
    for name, (value, found) in config_changes(ours, theirs).items():
        raise ConfigError(
            "`export.average_with` must be a backbone of the run's own config; got"
            f" `{name}` {value!s:.60} and {found!s:.60} there. Name a pipeline that the run started"
            " from, or another stage of it."
        )
