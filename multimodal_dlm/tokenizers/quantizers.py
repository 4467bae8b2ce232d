"""Quantizers: continuous latents <-> discrete codes, one interface for all.

A quantizer maps latents (batch, channels, height, width) to *codes*, a tuple over levels of long
tensors (batch, height, width), and codes back to latents. Every gradient is straight-through
(Bengio et al. 2013, arXiv 1308.3432). Adding a quantizer: one class here and one `QUANTIZERS` row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from multimodal_dlm.errors import ConfigError, VocabularyError, unknown_name

Codes = tuple[Int[Tensor, "batch rows columns"], ...]


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer returns.

    Args:
        quantized: Latents after quantization, gradient straight-through, (batch, c, h, w).
        codes: One long tensor (batch, h, w) per level.
        loss: Scalar added to the reconstruction loss; zero for FSQ.
    """

    quantized: Tensor
    codes: Codes
    loss: Tensor


class Quantizer(nn.Module, ABC):
    """Interface of all quantizers.

    Attributes:
        num_channels: Latent channels.
        codebook_sizes: Number of codes of each level.
    """

    num_channels: int
    codebook_sizes: tuple[int, ...]

    @abstractmethod
    def forward(self, latents: Float[Tensor, "batch c h w"]) -> QuantizerOutput:
        """Latents -> quantized latents, codes and auxiliary loss."""

    @abstractmethod
    def decode_codes(self, codes: Codes) -> Float[Tensor, "batch c h w"]:
        """Codes -> latents."""

    @abstractmethod
    def code_features(self) -> tuple[Float[Tensor, "codes features"], ...]:
        """What each code stands for, one matrix per level: codes that decode alike are close."""

    def check_codes(self, codes: Codes) -> None:
        """Refuse what is no tuple of long (batch, h, w) inside the codebook, naming the value."""
        if not isinstance(codes, tuple | list):
            raise VocabularyError(
                f"`codes` must be a tuple over levels; got a {type(codes).__name__}. Use (codes,)."
            )
        if len(codes) != len(self.codebook_sizes):
            raise VocabularyError(
                f"`codes` must be a tuple of {len(self.codebook_sizes)} levels; got {len(codes)}."
            )
        for level, (values, size) in enumerate(zip(codes, self.codebook_sizes, strict=True)):
            if values.ndim != 3 or values.is_floating_point():
                raise VocabularyError(
                    f"`codes` of level {level} must be long (batch, height, width); got"
                    f" {values.dtype} {tuple(values.shape)}."
                )
            if values.numel() and (int(values.min()) < 0 or int(values.max()) >= size):
                bad = values[(values < 0) | (values >= size)].flatten()[0]
                raise VocabularyError(
                    f"`codes` of level {level} must lie in 0..{size - 1}; got {int(bad)}."
                )


class FSQ(Quantizer):
    """Finite scalar quantization: each channel is bounded, then rounded to a few values.

    Mentzer et al. 2023 (arXiv 2309.15505), section 3.1 and appendix A. Channel i takes `levels[i]`
    values; an even number of levels is shifted by half a step so that zero is not a boundary.
    There is no codebook to learn and no auxiliary loss.

    Args:
        levels: Values per channel, each at least 2; the codebook has their product.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ConfigError(f"FSQ `levels` must be at least 2 each; got {list(levels)}.")
        self.levels = tuple(int(level) for level in levels)
        self.num_channels = len(self.levels)
        self.codebook_sizes = (math.prod(self.levels),)

    def _sizes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and mixed-radix weights as (1, c, 1, 1) tensors."""
        levels = torch.tensor(self.levels, device=like.device)
        weights = torch.tensor(
            [math.prod(self.levels[:i]) for i in range(self.num_channels)], device=like.device
        )
        return levels.view(1, -1, 1, 1), weights.view(1, -1, 1, 1)

    def forward(self, latents: Float[Tensor, "batch c h w"]) -> QuantizerOutput:
        """Bound, round and index; float32 throughout so that codes do not depend on autocast."""
        levels, weights = self._sizes(latents)
        is_even = (levels % 2 == 0).float()
        half = (levels - 1).float() * (1 + 1e-3) / 2
        offset = 0.5 * is_even
        shift = torch.atanh(offset / half)
        bounded = torch.tanh(latents.float() + shift) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        half_width = torch.div(levels, 2, rounding_mode="floor")
        digits = (rounded.detach().round().long() + half_width).clamp(min=0)
        digits = torch.minimum(digits, levels - 1)
        codes = (digits * weights).sum(dim=1)
        return QuantizerOutput(rounded / half_width, (codes,), latents.new_zeros(()))

    def code_features(self) -> tuple[Float[Tensor, "codes features"], ...]:
        """Every digit as a value and one-hot."""
        values = torch.arange(self.codebook_sizes[0])
        parts = []
        for channel, level in enumerate(self.levels):
            digits = values // math.prod(self.levels[:channel]) % level
            ramp = digits / (level - 1) * 2 - 1
            parts += [ramp.unsqueeze(1) * math.sqrt(3), F.one_hot(digits, level).float()]
        return (torch.cat(parts, dim=1),)

    def decode_codes(self, codes: Codes) -> Float[Tensor, "batch c h w"]:
        """Mixed-radix digits of each code, centred and scaled to about -1..1."""
        self.check_codes(codes)
        levels, weights = self._sizes(codes[0])
        digits = torch.div(codes[0].unsqueeze(1), weights, rounding_mode="floor") % levels
        half_width = torch.div(levels, 2, rounding_mode="floor")
        return (digits - half_width).float() / half_width


class LFQ(Quantizer):
    """Lookup-free quantization: the sign of each channel is one bit of the code.

    Yu et al. 2023 (arXiv 2310.05737), Eq. 3-5. The loss is a commitment term plus
    `entropy_weight` times (entropy of a token - `diversity_weight` x entropy of the mean token),
    per bit. A bit is 1 with p = sigmoid(4 z / temperature), the softmax over -(z -+ 1)^2 /
    temperature. Bits are independent given the latent, so the first entropy is exact; the second
    is the sum over bits, an upper bound of the joint entropy that 2 ** num_bits never limits.

    Args:
        num_bits: Channels; the codebook has 2 ** num_bits codes.
        commitment_weight: Weight of the squared distance to the quantized latent.
        entropy_weight: Weight of the entropy penalty.
        diversity_weight: Pull towards using every bit.
        temperature: Of the soft assignment inside the entropy penalty.
    """

    def __init__(
        self,
        num_bits: int,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_bits <= 20:
            raise ConfigError(f"LFQ `num_bits` must lie in 1..20; got {num_bits}.")
        self.num_channels = num_bits
        self.codebook_sizes = (2**num_bits,)
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.diversity_weight = diversity_weight
        self.temperature = temperature

    def forward(self, latents: Float[Tensor, "batch c h w"]) -> QuantizerOutput:
        """Signs, bits and the entropy penalty."""
        values = latents.float()
        signs = torch.where(values > 0, 1.0, -1.0)
        weights = 2 ** torch.arange(self.num_channels, device=values.device).view(1, -1, 1, 1)
        codes = ((values > 0).long() * weights).sum(dim=1)
        commitment = F.mse_loss(values, signs)
        p_one = torch.sigmoid(4 * values / self.temperature)
        token_entropy = _binary_entropy(p_one).mean()
        mean_entropy = _binary_entropy(p_one.mean(dim=(0, 2, 3))).mean()
        penalty = token_entropy - self.diversity_weight * mean_entropy
        loss = self.commitment_weight * commitment + self.entropy_weight * penalty
        return QuantizerOutput(values + (signs - values).detach(), (codes,), loss)

    def code_features(self) -> tuple[Float[Tensor, "codes features"], ...]:
        """The bits as -1 or 1."""
        codes = torch.arange(self.codebook_sizes[0]).view(-1, 1, 1)
        return (self.decode_codes((codes,)).flatten(1),)

    def decode_codes(self, codes: Codes) -> Float[Tensor, "batch c h w"]:
        """Bits of each code as -1 or 1."""
        self.check_codes(codes)
        shifts = torch.arange(self.num_channels, device=codes[0].device).view(1, -1, 1, 1)
        return ((codes[0].unsqueeze(1) >> shifts) & 1).float() * 2 - 1


class VectorQuantizer(Quantizer):
    """Vector quantization with an exponential-moving-average codebook and dead-code revival.

    van den Oord et al. 2017 (arXiv 1711.00937), section 3 and appendix A.1. A code whose moving
    count falls below `revival_threshold` is replaced by a latent of the current batch. Draws are
    keyed by (`seed`, number of updates), both saved, so a resumed run revives the same codes.
    Under data parallelism the codebook follows the first process, whose buffers are broadcast.

    Args:
        codebook_size: Number of codes.
        num_channels: Latent channels.
        commitment_weight: Weight of the commitment loss (beta).
        decay: Of the moving averages.
        revival_threshold: Moving count under which a code is revived; 0 turns revival off.
        seed: Of the first codebook and of the revivals.
    """

    embedding: Tensor
    counts: Tensor
    sums: Tensor
    num_updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        num_channels: int,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        revival_threshold: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or num_channels < 1:
            raise ConfigError(
                "VQ needs `codebook_size` >= 2 and `num_channels` >= 1; got"
                f" {codebook_size} and {num_channels}."
            )
        self.num_channels = num_channels
        self.codebook_sizes = (codebook_size,)
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.revival_threshold = revival_threshold
        self.seed = seed
        start = torch.randn(codebook_size, num_channels, generator=self._generator(0))
        self.register_buffer("embedding", start)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", start.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def _generator(self, update: int) -> torch.Generator:
        """Draws of one update of the codebook; update 0 is its first value."""
        return torch.Generator().manual_seed((self.seed << 32) + update)

    def forward(self, latents: Float[Tensor, "batch c h w"]) -> QuantizerOutput:
        """Nearest codes; in training mode the codebook follows the latents."""
        values = latents.float()
        flat = values.permute(0, 2, 3, 1).reshape(-1, self.num_channels)
        book = self.embedding.float()
        with torch.autocast(flat.device.type, enabled=False):  # bfloat16 would change codes.
            distances = book.pow(2).sum(dim=1) - 2 * flat @ book.T
        nearest = distances.argmin(dim=1)
        codes = nearest.view(values.shape[0], *values.shape[2:])
        quantized = book[nearest].view(*codes.shape, -1).permute(0, 3, 1, 2)
        loss = self.commitment_weight * F.mse_loss(values, quantized)
        if self.training:
            self._follow(flat.detach(), nearest)
        return QuantizerOutput(values + (quantized - values).detach(), (codes,), loss)

    @torch.no_grad()
    def _follow(self, flat: Tensor, nearest: Tensor) -> None:
        """One moving-average update of counts, sums and codebook, then revival."""
        self.num_updates += 1
        counts = torch.bincount(nearest, minlength=self.codebook_sizes[0]).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, flat)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = (self.counts < self.revival_threshold).nonzero().flatten()
        if len(dead):
            generator = self._generator(int(self.num_updates))
            picks = torch.randint(len(flat), (len(dead),), generator=generator)
            self.sums[dead] = flat[picks.to(flat.device)]
            self.counts[dead] = 1.0
        self.embedding.copy_(self.sums / self.counts.clamp(min=1e-5).unsqueeze(1))

    def code_features(self) -> tuple[Float[Tensor, "codes features"], ...]:
        """The codebook."""
        return (self.embedding.detach().float().cpu().clone(),)

    def decode_codes(self, codes: Codes) -> Float[Tensor, "batch c h w"]:
        """Rows of the codebook."""
        self.check_codes(codes)
        return self.embedding.float()[codes[0]].permute(0, 3, 1, 2)


QUANTIZERS: dict[str, type[Quantizer]] = {"fsq": FSQ, "lfq": LFQ, "vq": VectorQuantizer}


def build_quantizer(config: Mapping[str, Any]) -> Quantizer:
    """Build a quantizer from `{"type": "fsq", **keyword arguments}`."""
    options = dict(config)
    name = options.pop("type", None)
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", str(name), QUANTIZERS)
    try:
        return QUANTIZERS[name](**options)
    except TypeError as error:
        raise ConfigError(f"Quantizer `{name}` cannot take {options}: {error}.") from error


def codebook_usage(codes: Int[Tensor, "*shape"], codebook_size: int) -> float:
    """Share of the codebook that occurs at least once, in [0, 1]."""
    return codes.unique().numel() / codebook_size


def codebook_perplexity(codes: Int[Tensor, "*shape"], codebook_size: int) -> float:
    """exp(entropy in nats of the code frequencies), in [1, codebook_size]."""
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    shares = counts / counts.sum()
    return math.exp(-float((shares * shares.clamp(min=1e-300).log()).sum()))


def _binary_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of a coin with probability p."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
