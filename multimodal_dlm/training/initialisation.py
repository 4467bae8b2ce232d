"""Starting token embeddings from what the tokens stand for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.models.transformer import UnifiedTransformerModel

SHARED_SHARE = 0.8  # Share of the variance that comes from the features.


@torch.no_grad()
def start_from_features(
    model: UnifiedTransformerModel,
    modality: str,
    features: Sequence[Float[Tensor, "codes features"]],
    *,
    seed: int,
) -> None:
    """Give codes that decode alike embeddings that are alike.

    The rows of a modality become 0.8 (in variance) a random projection of the features and 0.2 what
    they were; their scale stays. With a few hundred thousand rows of training a table of
    independent rows has to learn from scratch that two shades of red are one colour.

    Args:
        model: New backbone.
        modality: Whose rows.
        features: One matrix per segment of the modality, in column order.
        seed: Of the projections.
    """
    generator = torch.Generator().manual_seed(seed)
    for part, values in zip(model.vocabulary.modality_segments(modality), features, strict=True):
        rows = model.embed_tokens.weight[part.offset : part.stop]
        centred = values.to(rows) - values.to(rows).mean(dim=0)
        projection = torch.randn(values.shape[1], rows.shape[1], generator=generator).to(rows)
        shared = centred @ projection
        shared *= rows.std() / shared.std().clamp(min=1e-12)
        rows.copy_(SHARED_SHARE**0.5 * shared + (1 - SHARED_SHARE) ** 0.5 * rows)
