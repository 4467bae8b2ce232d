"""What one accelerator offers: memory and peak rates, from the makers' data sheets.

Rates are dense (no structured sparsity), in FLOP/s, one multiply-add counted as two. `bf16` is the
matrix unit with float32 accumulation, `no` is float32 without TF32, which this library leaves off.
"""

from dataclasses import dataclass, replace

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.precision import BF16Support


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: As the command line calls it.
        memory_gib: Memory that programs can allocate.
        peak_tflops: Peak rate by `mixed_precision` (`bf16`, `no`), 10^12 FLOP/s.
        reserve_gib: Kept for the driver, the communication library and fragmentation.
        source: Where the numbers come from.
        support: What `mixed_precision: auto` asks; None for a device that is not of one kind: then
            it is what the CPU of this machine can do.
    """

    name: str
    memory_gib: float
    peak_tflops: dict[str, float]
    reserve_gib: float
    source: str
    support: BF16Support | None

    def peak_flops(self, mixed_precision: str) -> float:
        """FLOP/s of a precision."""
        return self.peak_tflops[mixed_precision] * 1e12


def _gpu(name: str, memory_gib: float, bf16: float, fp32: float, source: str) -> Device:
    support = BF16Support(True, f"{name} has bf16 units")
    return Device(name, memory_gib, {"bf16": bf16, "no": fp32}, 2.0, source, support)


DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40", 39.4, 312.0, 19.5, "NVIDIA A100 data sheet, SXM"),
        _gpu("a100-80", 79.2, 312.0, 19.5, "NVIDIA A100 data sheet, SXM"),
        _gpu("h100", 79.2, 989.4, 66.9, "NVIDIA H100 data sheet, SXM; half of the sparse rate"),
        _gpu("h200", 139.8, 989.4, 66.9, "NVIDIA H200 data sheet, SXM; half of the sparse rate"),
        _gpu(
            "b200", 178.0, 2250.0, 75.0, "NVIDIA HGX B200 data sheet / 8; half of the sparse rate"
        ),
        _gpu("l40s", 44.4, 362.0, 91.6, "NVIDIA L40S data sheet"),
        _gpu("rtx4090", 23.6, 165.2, 82.6, "NVIDIA Ada architecture white paper, appendix A"),
        Device(
            "cpu",
            16.0,
            {"bf16": 1.0, "no": 0.1},
            1.0,
            "an example of two cores with AMX; measure yours with benchmarks/training_step.py",
            None,
        ),
    )
}


def get_device(
    name: str, *, memory_gib: float | None = None, peak_tflops: float | None = None
) -> Device:
    """A device of the table, with measured numbers in place of the table's.

    Args:
        name: Key of `DEVICES`.
        memory_gib: Memory that programs can allocate; None for the table's.
        peak_tflops: Peak rate at the run's precision; None for the table's.

    Raises:
        ConfigError: When the name is unknown or a number is not positive.
    """
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    device = DEVICES[name]
    for option, value in (("memory_gib", memory_gib), ("peak_tflops", peak_tflops)):
        if value is not None and value <= 0:
            raise ConfigError(f"`{option}` must be positive; got {value}. Leave it out.")
    if memory_gib is not None:
        device = replace(device, memory_gib=memory_gib)
    if peak_tflops is not None:
        device = replace(device, peak_tflops=dict.fromkeys(device.peak_tflops, peak_tflops))
    return device
