"""A perceptual distance on EfficientNet-Lite0 features.

Deep features compared channel by channel follow Zhang et al. 2018 (arXiv 1801.03924, Eq. 1) without
learned weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.efficientnet import load_efficientnet_lite0


class PerceptualDistance(nn.Module):
    """Mean squared difference of unit-length features at strides 2, 4 and 8.

    Args:
        num_stages: Stages of the network compared, 1..5; later ones see more meaning, less detail.
    """

    def __init__(self, *, num_stages: int = 3) -> None:
        super().__init__()
        if not 1 <= num_stages <= 5:
            raise ConfigError(f"`num_stages` must lie in 1..5; got {num_stages}.")
        network: Any = load_efficientnet_lite0()
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = nn.ModuleList(network.blocks[:num_stages])

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in eval mode: batch statistics are part of the released weights."""
        del mode
        return super().train(False)

    def features(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Unit-length features of pixels in [0, 1], one tensor per stage."""
        hidden = self.stem((pixels * 255 - 127) / 128)
        found = []
        for stage in self.stages:
            hidden = stage(hidden)
            found.append(F.normalize(hidden.float(), dim=1))
        return found

    def forward(
        self,
        first: Float[Tensor, "batch 3 height width"],
        second: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Distance of two batches, a scalar; the gradient flows into `first` only."""
        with torch.no_grad():
            targets = self.features(second)
        pairs = zip(self.features(first), targets, strict=True)
        return torch.stack([(a - b).pow(2).sum(dim=1).mean() for a, b in pairs]).sum()
