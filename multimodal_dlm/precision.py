"""Where bf16 is fast, and what `mixed_precision: auto` means: the one rule for all devices.

A CPU multiplies bf16 matrices in hardware with AMX or AVX512-BF16 (x86) or the bf16 extension of
Armv8.6, which PyTorch reaches through oneDNN. Without them each product is converted in software,
dozens of times slower than float32. CUDA devices have bf16 units from compute capability 8.0 on.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from multimodal_dlm.errors import ConfigError

logger = logging.getLogger(__name__)

# Keys of `torch.cpu.get_capabilities`, and the names people know.
CPU_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm bf16"}


@dataclass(frozen=True)
class BF16Support:
    """Whether a device multiplies bf16 matrices in hardware.

    Args:
        is_fast: It does, so bf16 is no slower than float32.
        reason: Why, in a few words.
    """

    is_fast: bool
    reason: str


@dataclass(frozen=True)
class Precision:
    """What a run computes in.

    Args:
        value: `bf16` (autocast) or `no` (float32).
        reason: Why; empty where the config says the value itself.
    """

    value: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})" if self.reason else self.value


def cpu_support(capabilities: Mapping[str, object], *, has_onednn: bool) -> BF16Support:
    """The rule for CPUs.

    Args:
        capabilities: As `torch.cpu.get_capabilities` gives them.
        has_onednn: Whether PyTorch was built with oneDNN; without, the instructions are not used.
    """
    found = [words for key, words in CPU_INSTRUCTIONS.items() if capabilities.get(key)]
    if not found:
        return BF16Support(False, "this CPU has no bf16 instructions")
    if not has_onednn:
        return BF16Support(False, f"this PyTorch has no oneDNN to use the CPU's {found[0]}")
    return BF16Support(True, f"this CPU has {found[0]}")


def cpu_capabilities() -> Mapping[str, object]:
    """Instructions of this CPU by PyTorch's names; older versions know only those of x86."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def bf16_support(device: torch.device) -> BF16Support:
    """What a device of this machine can do; devices other than CPU and CUDA count as unable."""
    if device.type == "cpu":
        return cpu_support(cpu_capabilities(), has_onednn=torch.backends.mkldnn.is_available())
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return BF16Support(is_fast, f"this GPU has {'' if is_fast else 'no '}bf16 units")
    return BF16Support(False, f"bf16 is not known to be fast on `{device.type}`")


def resolve_precision(mixed_precision: str, support: BF16Support) -> Precision:
    """`auto` becomes `bf16` where that is fast, else `no`; a stated value stays.

    Args:
        mixed_precision: `auto`, `bf16` or `no`.
        support: Of the device that computes.
    """
    if mixed_precision != "auto":
        return Precision(mixed_precision)
    return Precision("bf16" if support.is_fast else "no", f"auto: {support.reason}")


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """The context that forwards run in.

    Args:
        device: Where they run.
        mixed_precision: `bf16` or `no`; `auto` must have been resolved.
    """
    assert mixed_precision in ("bf16", "no"), mixed_precision
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def software_bf16(device: torch.device) -> str | None:
    """A sentence when bf16 runs in software on this CPU; None elsewhere."""
    support = bf16_support(device)
    if device.type != "cpu" or support.is_fast:
        return None
    return f"bf16 is computed in software, many times slower than float32: {support.reason}."


def warn_of_software_bf16(device: torch.device, dtype: torch.dtype) -> None:
    """Say once in a process that a bfloat16 model is slow on this CPU, and what to do."""
    problem = software_bf16(device) if dtype == torch.bfloat16 else None
    if problem is not None:
        _warn_once(f"{problem} Load with `dtype=torch.float32`, or call `pipe.to(torch.float32)`.")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def check_float64(device: str | torch.device) -> None:
    """Refuse a device without float64: positions and draws of tokens are made in it.

    Args:
        device: A device, or its name, `auto` included.

    Raises:
        ConfigError: For MPS.
    """
    if str(device).partition(":")[0] == "mps":
        raise ConfigError(
            f"`device` must compute in float64, which Apple's MPS does not; got `{device}`. Use"
            " `cpu`."
        )
