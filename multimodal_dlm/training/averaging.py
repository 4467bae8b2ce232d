"""The mean of a trained backbone and another, such as the one before a stage.

A stage that is about one task takes something from the others; a mean of the weights before and
after it often keeps most of both (Wortsman et al. 2022, arXiv 2109.01903, section 3).
"""

import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.training.config import plain


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


def check_same(transformer: UnifiedTransformerModel, other: UnifiedTransformerModel) -> None:
    """Refuse to average backbones of different configs.

    Raises:
        ConfigError: When an entry differs.
    """
    for name, value in transformer.config.items():
        found = other.config.get(name)
        if not name.startswith("_") and plain(value) != plain(found):
            raise ConfigError(
                "`export.average_with` must be a backbone of the run's own config; got"
                f" `{name}` {plain(value)!s:.60} and {plain(found)!s:.60} there. Name a pipeline"
                " that the run started from, or another stage of it."
            )
