"""What a step refuses: tensors that contradict each other, missing columns or generators."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers.settings import ModalitySettings


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"`{name}` must have shape {shape}; got {tuple(tensor.shape)}.")


def check_tensors(
    model_output: Tensor,
    sample: Tensor,
    is_free: Tensor,
    initial_sample: Tensor,
    token_quality: Tensor | None,
) -> None:
    """Refuse tensors whose shapes contradict each other."""
    shape = tuple(sample.shape)
    if model_output.ndim != 3 or tuple(model_output.shape[:2]) != shape:
        raise ConfigError(
            f"`model_output` must have shape {shape} + (columns,); got"
            f" {tuple(model_output.shape)}. Pass the logits of this group's positions only."
        )
    check_shape("is_free", is_free, shape)
    check_shape("state.initial_sample", initial_sample, shape)
    if token_quality is not None:
        check_shape("token_quality", token_quality, shape)


def check_length_rule(modality: str, settings: ModalitySettings, num_columns: int) -> None:
    """Refuse a length rule outside the columns."""
    for name in ("eos_column", "fill_column"):
        column = getattr(settings, name)
        if column is not None and column >= num_columns:
            raise ConfigError(
                f"`{name}` of modality `{modality}` must be below the number of columns,"
                f" {num_columns}; got {column}. Correct `modalities` or use None."
            )


def expand_allowed(
    allowed: Tensor | None,
    logits: Float[Tensor, "batch seq columns"],
    is_masked: Bool[Tensor, "batch seq"],
) -> Bool[Tensor, "batch seq columns"] | None:
    """Broadcast `allowed` to the logits, and refuse a masked position without any column."""
    if allowed is None:
        return None
    try:
        expanded = allowed.expand(logits.shape)
    except RuntimeError as error:
        raise ConfigError(
            f"`allowed` must be broadcastable to {tuple(logits.shape)} (batch, positions,"
            f" columns); got {tuple(allowed.shape)}."
        ) from error
    is_stuck = is_masked & ~expanded.any(dim=-1)
    if bool(is_stuck.any()):
        row, position = is_stuck.nonzero()[0].tolist()
        raise ConfigError(
            "`allowed` must leave at least one column at every masked free position; got none at"
            f" row {row}, position {position}. Allow a column there or make it not free."
        )
    return expanded


def as_row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> Sequence[torch.Generator]:
    """One generator per row; a bare generator serves a batch of one."""
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    if generators is None or len(generators) != batch:
        got = "none" if generators is None else str(len(generators))
        raise ConfigError(
            f"`generator` must hold one `torch.Generator` per row, {batch}; got {got}. Use"
            f" [torch.Generator().manual_seed(seed + row) for row in range({batch})]."
        )
    return generators
