"""The image tokenizer: pixels <-> a grid of codes.

A convolutional autoencoder around a quantizer. Pixels are folded 4 x 4 into channels at once, so
that nearly all work is wide convolution on small maps (what a CPU and a GPU both do well); blocks
are residual, start as the identity and carry no normalisation.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from multimodal_dlm.errors import ConfigError, VocabularyError
from multimodal_dlm.tokenizers.quantizers import Codes, QuantizerOutput, build_quantizer

FOLD = 4


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the last convolution zero at the start."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv_out = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Same shape in and out."""
        inner = self.conv_in(F.silu(hidden_states))
        return hidden_states + self.conv_out(F.silu(inner))


class ImageTokenizer(ModelMixin, ConfigMixin):
    """Autoencoder with a discrete bottleneck: one code tuple per 8 x 8 pixels.

    Args:
        image_size: Side of the square pictures, in pixels; a multiple of 8.
        channels: Width of the maps at 1/4 and at 1/8 of the resolution.
        encoder_layers: Residual blocks at 1/4 and at 1/8 in the encoder.
        decoder_layers: Residual blocks at 1/8 and at 1/4 in the decoder.
        encoder_kernels: Kernel sizes, 1 or 3, of the first convolution and of the encoder's blocks
            at 1/4 and at 1/8. (3, 1, 1) sees 4 pixels beyond a token's own 8 x 8: a blank patch
            then has one code wherever it is, which a backbone learns much faster than codes that
            carry their neighbours' detail.
        quantizer: `{"type": "fsq" | "lfq" | "vq", ...}`, see `build_quantizer`.
        fingerprint: SHA-256 of what gives the codes their meaning, the encoder and the quantizer,
            at release; None while training. A better decoder keeps it, and so fits every backbone
            that was trained on the codes.
    """

    _supports_group_offloading = True
    _no_split_modules = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: tuple[int, int] = (192, 256),
        encoder_layers: tuple[int, int] = (1, 2),
        decoder_layers: tuple[int, int] = (2, 2),
        encoder_kernels: tuple[int, int, int] = (3, 3, 3),
        quantizer: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if image_size % (2 * FOLD):
            raise ConfigError(f"`image_size` must be a multiple of 8; got {image_size}. Use 64.")
        if not set(encoder_kernels) <= {1, 3}:
            raise ConfigError(
                f"`encoder_kernels` must be 1 or 3 each; got {tuple(encoder_kernels)}."
                " Use (3, 1, 1)."
            )
        fine, coarse = channels
        first, inner, outer = encoder_kernels
        size, margin = (3, 1) if outer == 3 else (2, 0)  # A local encoder halves without overlap.
        self.bottleneck = build_quantizer(quantizer or {"type": "fsq", "levels": [8, 8, 8, 5]})
        latent = self.bottleneck.num_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * FOLD**2, fine, first, padding=first // 2),
            *(ResidualBlock(fine, inner) for _ in range(encoder_layers[0])),
            nn.Conv2d(fine, coarse, size, stride=2, padding=margin),
            *(ResidualBlock(coarse, outer) for _ in range(encoder_layers[1])),
            nn.SiLU(),
            nn.Conv2d(coarse, latent, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, coarse, 3, padding=1),
            *(ResidualBlock(coarse) for _ in range(decoder_layers[0])),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(fine) for _ in range(decoder_layers[1])),
            nn.SiLU(),
            nn.Conv2d(fine, 4 * 48, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return self.bottleneck.codebook_sizes

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the code grid, in tokens."""
        side = self.config["image_size"] // (2 * FOLD)
        return (side, side)

    def code_features(self) -> tuple[Tensor, ...]:
        """What each code stands for, one (codes, features) matrix per level."""
        return self.bottleneck.code_features()

    @property
    def fingerprint(self) -> str:
        """SHA-256 at release, or of the present tensors when never released."""
        return self.config["fingerprint"] or self.compute_fingerprint()

    def compute_fingerprint(self) -> str:
        """SHA-256 of what gives the codes their meaning.

        Over the settings of the quantizer, and over the names and the float32 bytes of the tensors
        of encoder and quantizer in name order.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config["quantizer"], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith("decoder."):
                continue
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def mark_released(self) -> str:
        """Store the fingerprint of the present tensors in the config and return it."""
        fingerprint = self.compute_fingerprint()
        self.register_to_config(fingerprint=fingerprint)
        return fingerprint

    def to_json_string(self) -> str:
        """The config as saved, without the folder it was loaded from."""
        content = json.loads(super().to_json_string())
        content.pop("_name_or_path", None)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def quantize(self, pixels: Float[Tensor, "batch 3 height width"]) -> QuantizerOutput:
        """Pixels in [0, 1] -> quantized latents, codes and quantizer loss."""
        size = self.config["image_size"]
        if pixels.shape[1:] != (3, size, size):
            raise ConfigError(
                f"`pixels` must have shape (batch, 3, {size}, {size}); got {tuple(pixels.shape)}."
                f" Resize to {size} x {size} first."
            )
        folded = F.pixel_unshuffle((pixels * 2 - 1).to(self.dtype), FOLD)
        folded = folded.contiguous(memory_format=torch.channels_last)
        return self.bottleneck(self.encoder(folded))

    def decode_latents(self, latents: Float[Tensor, "batch c h w"]) -> Tensor:
        """Quantized latents -> pixels around [0, 1], not clamped, float32."""
        latents = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.decoder(latents).float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Codes:
        """Pixels in [0, 1] -> codes, a tuple over levels of long (batch, h, w).

        Raises:
            ConfigError: When the size is another, the dtype is not floating or the range is not
                [0, 1].
        """
        if not pixels.is_floating_point():
            raise ConfigError(
                f"`pixels` must be floating point in [0, 1]; got {pixels.dtype}. Divide by 255."
            )
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 1.0)
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # Also false for NaN.
            raise ConfigError(
                f"`pixels` must lie in [0, 1]; got {low:.3g}..{high:.3g}. Rescale them."
            )
        return self.quantize(pixels).codes

    @torch.no_grad()
    def decode(self, codes: Codes) -> Float[Tensor, "batch 3 height width"]:
        """Codes -> pixels in [0, 1], float32.

        Raises:
            VocabularyError: When a code is not in the codebook (the message holds the value) or
                the grid is another.
        """
        self.bottleneck.check_codes(codes)
        for level, values in enumerate(codes):
            if tuple(values.shape[1:]) != self.grid_size:
                raise VocabularyError(
                    f"`codes` of level {level} must have the grid {self.grid_size}; got"
                    f" {tuple(values.shape[1:])}."
                )
        return self.decode_latents(self.bottleneck.decode_codes(codes)).clamp(0, 1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """Reconstruction (not clamped) and quantizer loss, for training."""
        output = self.quantize(pixels)
        return self.decode_latents(output.quantized), output.loss


def pixels_from_images(images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> Tensor:
    """RGB bytes -> float pixels in [0, 1], (batch, 3, height, width)."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float() / 255
