"""Tiny models and canvases for the backbone's tests."""

from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.vocabulary import UnifiedVocabulary

AXES = (8, 4, 4)


def tiny_vocabulary() -> UnifiedVocabulary:
    """Two modalities of 24 and 40 columns."""
    return UnifiedVocabulary.build(
        segments={"text": [("text", 24)], "image": [("image.0", 40)]},
        special={"eos": ("text", 0), "fill": ("text", 1)},
        fingerprints={"text": "abc"},
    )


def tiny_model(seed: int = 0, *, randomise: bool = True, **options: Any) -> UnifiedTransformerModel:
    """Two layers of width 32; `randomise` moves every weight away from its start."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vocabulary = options.pop("vocabulary", tiny_vocabulary().to_dict())
    options = {"axes_dims_rope": AXES, **shape, **options}
    model = UnifiedTransformerModel(vocabulary=vocabulary, **options)
    if randomise:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def make_canvas(order: Tensor, *, seed: int = 0, is_padding: Tensor | None = None) -> Canvas:
    """A canvas of random ids, some masked, one window, the given orders."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = tiny_vocabulary()
    shape = order.shape
    columns = vocabulary.columns("image")
    ids = torch.randint(columns.start, columns.stop, shape, generator=generator)
    is_masked = torch.rand(shape, generator=generator) < 0.5
    is_padding = torch.zeros(shape, dtype=torch.bool) if is_padding is None else is_padding
    ids = ids.masked_fill(is_masked, vocabulary.mask_token_id("image"))
    ids = ids.masked_fill(is_padding, vocabulary.special_id("pad"))
    return Canvas(
        input_ids=ids,
        window_ids=torch.ones(shape, dtype=torch.long),
        modality_ids=torch.ones(shape, dtype=torch.long),
        position_ids=torch.randint(0, 9, (*shape, 3), generator=generator),
        order=order,
        document_ids=torch.zeros(shape, dtype=torch.long),
        is_free=is_masked & ~is_padding,
        is_padding=is_padding,
    )


def run(model: UnifiedTransformerModel, canvas: Canvas, **options: Any) -> Tensor:
    """Hidden states of a canvas."""
    options.setdefault("attention_plan", AttentionPlan.from_canvas(canvas))
    options.setdefault("noise_levels", noise_levels(canvas, model.vocabulary))
    return model(
        canvas.input_ids,
        modality_ids=canvas.modality_ids,
        position_ids=canvas.position_ids,
        **options,
    ).hidden_states


def tolerance(dtype: torch.dtype, reference: Tensor) -> float:
    """The exactness bound: 1e-10 in float64, 1e-5 x max(1, max |value|) in float32."""
    if dtype == torch.float64:
        return 1e-10
    return 1e-5 * max(1.0, float(reference.detach().abs().max()))
