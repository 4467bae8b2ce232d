"""The planning command: what a run needs and gives on some devices, before any is rented."""

import dataclasses
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.reporting import USER_ERROR, Report
from multimodal_dlm.training.config import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the devices, `--config` and one option per field of the config."""
    parser.add_argument("--config", action="config", help="YAML file; options override its values")
    parser.add_function_arguments(run_plan, skip={"fields"})
    parser.add_class_arguments(TrainConfig, None)


def run_plan(
    device: str = "h100",
    devices: int = 1,
    utilisation: float = 0.4,
    token_budget: float | None = None,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    **fields: Any,
) -> Report:
    """Say whether a run fits, how fast it would be, and what to change.

    Args:
        device: a100-40, a100-80, h100, h200, b200, l40s, rtx4090 or cpu.
        devices: Devices that train together.
        utilisation: Share of the device's peak rate that is reached, in (0, 1].
        token_budget: Tokens to train on, such as 1e11; those of the run without it.
        memory_gib: Memory of a device, in place of the table's.
        peak_tflops: Peak rate of a device at the run's precision, in place of the table's.
        fields: Of `TrainConfig`.
    """
    from multimodal_dlm.training.devices import get_device
    from multimodal_dlm.training.planning import plan

    names = {part.name for part in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in fields.items() if name in names})
    made = plan(
        config,
        get_device(device, memory_gib=memory_gib, peak_tflops=peak_tflops),
        devices,
        utilisation=utilisation,
        token_budget=token_budget,
    )
    status = 0 if made.is_possible else USER_ERROR
    return Report(made.values, "\n".join(_lines(made.values)), status)


def _lines(values: dict[str, Any]) -> list[str]:
    """A plan for people."""
    from multimodal_dlm.precision import Precision

    tokens_from = "" if values["tokens_from"] == "data" else " (the longest rows: no data here)"
    lines = [
        f"{values['num_parameters'] / 1e6:,.1f} M parameters on {values['devices']} x"
        f" {values['device']}, sharding {values['sharding']}",
        f"precision {Precision(values['mixed_precision'], values['mixed_precision_reason'])}",
        f"step      {values['rows_per_step']:,} rows, {values['tokens_per_step']:,} tokens"
        f"{tokens_from}, {values['padding_share']:.1%} padding; a device takes"
        f" {values['rows_per_device']:,} rows in {values['micro_batches']} x"
        f" {values['micro_batch_rows']}",
        f"FLOPs     {values['forward_flops_per_token']:.3g} forward,"
        f" {values['training_flops_per_token']:.3g} training, a token",
        f"speed     {values['tokens_per_s']:,.0f} tokens a second at {values['utilisation']:.0%} of"
        f" the peak, {values['step_s']:.3g} s a step",
        f"time      {_duration(values['days'])} for {values['token_budget']:.3g} tokens",
        f"memory    {values['memory_gib']['total']:.2f} of {values['device_memory_gib']:g} GiB:",
    ]
    for name, gib in values["memory_gib"].items():
        if name != "total" and gib:
            lines.append(f"  {name.replace('_', ' '):<22} {gib:9.3f} GiB")
    lines.append(f"  checkpoint, on the host {values['checkpoint_gib']:8.3f} GiB")
    lines.append("other settings with this micro-batch:")
    for other in values["alternatives"]:
        how = "recomputed blocks" if other["gradient_checkpointing"] else "kept activations"
        verdict = "fits" if other["fits"] else "does not fit"
        lines.append(f"  {other['sharding']:<6} {how:<18} {other['total_gib']:9.2f} GiB  {verdict}")
    lines += [f"problem   {problem}" for problem in values["problems"]]
    if values["changes"]:
        lines.append(f"change    {', '.join(values['changes'])}")
    return lines


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"
