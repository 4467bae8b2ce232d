"""Mask schedules: alpha(t), the probability that a token is still clean at time t.

t = 0 is clean and t = 1 fully masked, so alpha(0) = 1 and alpha(1) = 0, exactly. Each schedule is
written as its mask rate m(t) = 1 - alpha(t), with derivative and inverse; all three take floats
(computed in float64) and tensors alike.
"""

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from multimodal_dlm.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class MaskSchedule:
    """Interface of all mask schedules."""

    def mask_rate(self, t: Tensor) -> Tensor:
        """m(t) for t in [0, 1], with m(0) = 0 and m(1) = 1."""
        raise NotImplementedError

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """dm/dt, not negative."""
        raise NotImplementedError

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """The t with m(t) = rate."""
        raise NotImplementedError

    @overload
    def alpha(self, t: float) -> float: ...
    @overload
    def alpha(self, t: Tensor) -> Tensor: ...
    def alpha(self, t: float | Tensor) -> float | Tensor:
        """Probability that a token is still clean.

        Raises:
            ConfigError: When t lies outside [0, 1].
        """
        times = _unit_interval(t, "t")
        rate = self.mask_rate(times).clamp(0, 1)
        # Rounding must not leave a clean token at t = 1 or a masked one at t = 0.
        rate = torch.where(times <= 0, 0.0, torch.where(times >= 1, 1.0, rate))
        return _like(1 - rate, t)

    @overload
    def alpha_derivative(self, t: float) -> float: ...
    @overload
    def alpha_derivative(self, t: Tensor) -> Tensor: ...
    def alpha_derivative(self, t: float | Tensor) -> float | Tensor:
        """d alpha / dt, not positive."""
        return _like(-self.mask_rate_derivative(_unit_interval(t, "t")), t)

    @overload
    def inverse(self, alpha: float) -> float: ...
    @overload
    def inverse(self, alpha: Tensor) -> Tensor: ...
    def inverse(self, alpha: float | Tensor) -> float | Tensor:
        """The time at which `alpha` of the tokens are still clean."""
        kept = _unit_interval(alpha, "alpha")
        return _like(self.mask_rate_inverse(1 - kept).clamp(0, 1), alpha)


@dataclass(frozen=True)
class LinearSchedule(MaskSchedule):
    """m(t) = t (Sahoo et al. 2024, arXiv 2406.07524, log-linear noise; LLaDA)."""

    def mask_rate(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """The rate itself."""
        return rate


@dataclass(frozen=True)
class CosineSchedule(MaskSchedule):
    """m(t) = sin(pi t / 2), the cosine schedule of MaskGIT (Chang et al. 2022, arXiv 2202.04200)."""

    def mask_rate(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(t * (math.pi / 2))

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """pi / 2 x cos(pi t / 2)."""
        return torch.cos(t * (math.pi / 2)) * (math.pi / 2)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """2 / pi x arcsin(rate)."""
        return torch.asin(rate) * (2 / math.pi)


@dataclass(frozen=True)
class PolynomialSchedule(MaskSchedule):
    """m(t) = t^power (Shi et al. 2024, arXiv 2406.04329, Table 4).

    Args:
        power: Above 0.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ConfigError(f"`power` must be above 0; got {self.power}. Use 2.")

    def mask_rate(self, t: Tensor) -> Tensor:
        """t^power."""
        return t**self.power

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """power x t^(power - 1)."""
        return self.power * t ** (self.power - 1)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """rate^(1 / power)."""
        return rate ** (1 / self.power)


@dataclass(frozen=True)
class GeometricSchedule(MaskSchedule):
    """Committed share (e^{a r} - 1) / (e^a - 1) at progress r = 1 - t: commits grow geometrically.

    Nearly optimal step sizes for a model whose conditional entropies fall as tokens are known.

    Args:
        growth: The exponent a, above 0.
    """

    growth: float = 3.0

    def __post_init__(self) -> None:
        if not self.growth > 0:
            raise ConfigError(f"`growth` must be above 0; got {self.growth}. Use 3.")

    def mask_rate(self, t: Tensor) -> Tensor:
        """1 - (e^{a (1 - t)} - 1) / (e^a - 1)."""
        return 1 - torch.expm1((1 - t) * self.growth) / math.expm1(self.growth)

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """a e^{a (1 - t)} / (e^a - 1)."""
        return self.growth * torch.exp((1 - t) * self.growth) / math.expm1(self.growth)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """1 - log(1 + (1 - rate)(e^a - 1)) / a."""
        return 1 - torch.log1p((1 - rate) * math.expm1(self.growth)) / self.growth


MASK_SCHEDULES: dict[str, type[MaskSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "polynomial": PolynomialSchedule,
    "geometric": GeometricSchedule,
}


def get_mask_schedule(name: str, **options: float) -> MaskSchedule:
    """A mask schedule by name.

    Args:
        name: `linear`, `cosine`, `polynomial` or `geometric`.
        options: `power` of polynomial, `growth` of geometric.

    Raises:
        ConfigError: When the name is unknown or takes no such option.
    """
    if name not in MASK_SCHEDULES:
        raise unknown_name("mask schedule", name, MASK_SCHEDULES)
    try:
        return MASK_SCHEDULES[name](**options)
    except TypeError as error:
        raise ConfigError(f"Mask schedule `{name}` cannot take {options}: {error}.") from error


def _unit_interval(value: float | Tensor, name: str) -> Tensor:
    """The value as a tensor (float64 for a float), refused outside [0, 1]."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if tensor.numel() and (float(tensor.min()) < 0 or float(tensor.max()) > 1):
        raise ConfigError(
            f"`{name}` must lie in [0, 1]; got {float(tensor.min()):.6g}..{float(tensor.max()):.6g}."
        )
    return tensor


def _like(result: Tensor, value: float | Tensor) -> float | Tensor:
    """A float for a float, a tensor for a tensor."""
    return result if isinstance(value, Tensor) else float(result)
