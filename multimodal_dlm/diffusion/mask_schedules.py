"""Mask schedules: alpha(t), the probability that a token is still clean at time t.

t = 0 is clean and t = 1 fully masked, so alpha(0) = 1 and alpha(1) = 0, exactly. A schedule is
written as its mask rate m(t) = 1 - alpha(t) with derivative and inverse. The three public methods
take a float (computed in float64 on the host, returned as a float) or a tensor (returned as one).
Nothing here knows tokens; drawing from a schedule is the forward process.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, overload

import torch
from torch import Tensor

from multimodal_dlm.errors import ConfigError, make_named


@dataclasses.dataclass(frozen=True)
class MaskSchedule(ABC):
    """Base of the mask schedules: a subclass gives the mask rate, its derivative and its inverse.

    Examples:
        >>> schedule = get_mask_schedule("cosine")
        >>> schedule.alpha(0.0), schedule.alpha(1.0)
        (1.0, 0.0)
        >>> round(schedule.inverse(schedule.alpha(0.25)), 12)
        0.25
    """

    @abstractmethod
    def mask_rate(self, t: Tensor) -> Tensor:
        """Share m(t) of masked tokens for t in [0, 1]; increasing, m(0) = 0 and m(1) = 1."""

    @abstractmethod
    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """Slope dm/dt, never negative."""

    @abstractmethod
    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """Time t at which m(t) = rate."""

    @overload
    def alpha(self, t: float) -> float: ...
    @overload
    def alpha(self, t: Tensor) -> Tensor: ...
    def alpha(self, t: float | Tensor) -> float | Tensor:
        """Probability that a token is still clean; exactly 1 at t = 0 and 0 at t = 1.

        Args:
            t: Time in [0, 1].

        Raises:
            ConfigError: When t is not in [0, 1].
        """
        times = _unit_interval(t, "t")
        return _like(1 - _pin(self.mask_rate(times), times), t)

    @overload
    def alpha_derivative(self, t: float) -> float: ...
    @overload
    def alpha_derivative(self, t: Tensor) -> Tensor: ...
    def alpha_derivative(self, t: float | Tensor) -> float | Tensor:
        """Slope of alpha at t, never positive (minus infinity at 0 for `polynomial` below power 1).

        Args:
            t: Time in [0, 1].

        Raises:
            ConfigError: When t is not in [0, 1].
        """
        return _like(-self.mask_rate_derivative(_unit_interval(t, "t")), t)

    @overload
    def inverse(self, alpha: float) -> float: ...
    @overload
    def inverse(self, alpha: Tensor) -> Tensor: ...
    def inverse(self, alpha: float | Tensor) -> float | Tensor:
        """Time at which a token is still clean with probability `alpha`.

        Args:
            alpha: Probability in [0, 1].

        Raises:
            ConfigError: When alpha is not in [0, 1].
        """
        rate = 1 - _unit_interval(alpha, "alpha")
        return _like(_pin(self.mask_rate_inverse(rate), rate), alpha)


@dataclasses.dataclass(frozen=True)
class LinearSchedule(MaskSchedule):
    """Mask rate t (Sahoo et al. 2024, arXiv 2406.07524; Nie et al. 2025, arXiv 2502.09992)."""

    def mask_rate(self, t: Tensor) -> Tensor:
        """Rate t."""
        return t

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """Slope 1."""
        return torch.ones_like(t)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """Time equal to the rate."""
        return rate


@dataclasses.dataclass(frozen=True)
class CosineSchedule(MaskSchedule):
    """Mask rate sin(pi t / 2): cos(pi r / 2) at progress r = 1 - t.

    Chang et al. 2022 (MaskGIT, arXiv 2202.04200, section 3.3).
    """

    def mask_rate(self, t: Tensor) -> Tensor:
        """Rate sin(pi t / 2)."""
        return torch.sin(t * (math.pi / 2))

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """Slope pi / 2 x cos(pi t / 2)."""
        return torch.cos(t * (math.pi / 2)) * (math.pi / 2)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """Time 2 / pi x arcsin(rate)."""
        return torch.asin(rate) * (2 / math.pi)


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule(MaskSchedule):
    """Mask rate t^power (Shi et al. 2024, arXiv 2406.04329, Table 4).

    Args:
        power: Above 0; 1 is linear.

    Raises:
        ConfigError: When the power is not a finite number above 0.
    """

    power: int | float = 2.0

    def __post_init__(self) -> None:
        _check_positive("power", self.power, 2)

    def mask_rate(self, t: Tensor) -> Tensor:
        """Rate t^power."""
        return t**self.power

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """Slope power x t^(power - 1)."""
        return self.power * t ** (self.power - 1)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """Time rate^(1 / power)."""
        return rate ** (1 / self.power)


@dataclasses.dataclass(frozen=True)
class GeometricSchedule(MaskSchedule):
    """Committed share (e^{a r} - 1) / (e^a - 1) at progress r = 1 - t, with a = growth.

    Equal steps commit geometrically growing numbers of tokens: few while much is uncertain, many
    once most is known, where conditional entropies are small. The mask rate is written as
    (1 - e^{-a t}) / (1 - e^{-a}), the same number without cancellation near t = 0.

    Args:
        growth: The exponent a, above 0; towards 0 it becomes linear.

    Raises:
        ConfigError: When the growth is not a finite number above 0.
    """

    growth: int | float = 3.0

    def __post_init__(self) -> None:
        _check_positive("growth", self.growth, 3)

    def mask_rate(self, t: Tensor) -> Tensor:
        """Rate (1 - e^{-a t}) / (1 - e^{-a})."""
        return torch.expm1(-self.growth * t) / math.expm1(-self.growth)

    def mask_rate_derivative(self, t: Tensor) -> Tensor:
        """Slope a e^{-a t} / (1 - e^{-a})."""
        return -self.growth * torch.exp(-self.growth * t) / math.expm1(-self.growth)

    def mask_rate_inverse(self, rate: Tensor) -> Tensor:
        """Time -log(1 - rate (1 - e^{-a})) / a."""
        return -torch.log1p(rate * math.expm1(-self.growth)) / self.growth


MASK_SCHEDULES: dict[str, type[MaskSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "polynomial": PolynomialSchedule,
    "geometric": GeometricSchedule,
}


def get_mask_schedule(name: str, **options: Any) -> MaskSchedule:
    """Make a mask schedule by name.

    Args:
        name: `linear`, `cosine`, `polynomial` or `geometric`.
        options: `power` of `polynomial`, `growth` of `geometric`.

    Raises:
        ConfigError: When the name is unknown, has no such option, or refuses its value.
    """
    return make_named("mask schedule", MASK_SCHEDULES, name, options)


def _check_positive(name: str, value: Any, remedy: int) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise ConfigError(f"`{name}` must be a finite number above 0; got {value!r}. Use {remedy}.")


def _unit_interval(value: float | Tensor, name: str) -> Tensor:
    """The value as a tensor of float32 or better (float64 for a float), refused outside [0, 1]."""
    if isinstance(value, Tensor):
        tensor = value if value.dtype in (torch.float32, torch.float64) else value.float()
    else:
        tensor = torch.tensor(value, dtype=torch.float64)
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        low, high = tensor.min().item(), tensor.max().item()
        raise ConfigError(
            f"`{name}` must lie in [0, 1]; got values from {low:.6g} to {high:.6g}."
            " 0 is clean, 1 fully masked: divide step numbers by the number of steps."
        )
    return tensor


def _pin(result: Tensor, argument: Tensor) -> Tensor:
    """The result with 0 -> 0 and 1 -> 1 made exact, whatever rounding did."""
    ends = torch.where(argument <= 0, torch.zeros_like(result), result.clamp(0, 1))
    return torch.where(argument >= 1, torch.ones_like(result), ends)


def _like(result: Tensor, value: float | Tensor) -> float | Tensor:
    """A float for a float, a tensor for a tensor."""
    return result if isinstance(value, Tensor) else float(result)
