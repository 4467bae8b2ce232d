"""What a step refuses: tensors that contradict each other, missing columns or generators."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers.settings import ModalitySettings


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"`{name}` must have shape {shape}; got {tuple(tensor.shape)}.")


def check_tensors(model_output: Tensor, sample: Tensor, is_free: Tensor) -> None:
    """Refuse tensors whose shapes contradict each other."""
    shape = tuple(sample.shape)
    if model_output.ndim != 3 or tuple(model_output.shape[:2]) != shape:
        raise ConfigError(
            f"`model_output` must have shape {shape} + (columns,); got"
            f" {tuple(model_output.shape)}. Pass the logits of this group's positions only."
        )
    check_shape("is_free", is_free, shape)


def check_logits(logits: Tensor, num_masked: int) -> None:
    """Refuse logits that are not one row for each masked free position."""
    if logits.ndim != 2 or len(logits) != num_masked:
        raise ConfigError(
            f"`logits` must have shape ({num_masked}, columns), a row for each masked free"
            f" position; got {tuple(logits.shape)}. Pick them with `is_free & (sample == columns)`."
        )


def check_length_rule(modality: str, settings: ModalitySettings, num_columns: int) -> None:
    """Refuse a length rule outside the columns."""
    for name in ("eos_column", "fill_column"):
        column = getattr(settings, name)
        if column is not None and column >= num_columns:
            raise ConfigError(
                f"`{name}` of modality `{modality}` must be below the number of columns,"
                f" {num_columns}; got {column}. Correct `modalities` or use None."
            )


def allowed_at(
    allowed: Tensor | None, is_masked: Bool[Tensor, "batch seq"], num_columns: int
) -> Bool[Tensor, "masked columns"] | None:
    """`allowed` at the masked positions; one without any column is refused."""
    if allowed is None:
        return None
    shape = (*is_masked.shape, num_columns)
    try:
        picked = allowed.expand(shape)[is_masked]
    except RuntimeError as error:
        raise ConfigError(
            f"`allowed` must be broadcastable to {shape} (batch, positions, columns); got"
            f" {tuple(allowed.shape)}."
        ) from error
    has_column = picked.any(dim=-1)
    if not bool(has_column.all()):
        row, position = is_masked.nonzero()[~has_column][0].tolist()
        raise ConfigError(
            "`allowed` must leave at least one column at every masked free position; got none at"
            f" row {row}, position {position}. Allow a column there or make it not free."
        )
    return picked


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
