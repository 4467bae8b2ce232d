"""Default options per modality of each scheduler; the only place that names modalities.

Text is written greedily, most confident token first. Pictures are drawn: half of the tokens late,
in an order that is noisy at the start (Chang et al. 2022, MaskGIT, arXiv 2202.04200).
"""

from typing import Any

CONFIDENCE_MODALITIES: dict[str, dict[str, Any]] = {
    "text": {"mask_schedule": "linear", "eos_column": 0, "fill_column": 1},
    "image": {"mask_schedule": "cosine", "temperature": 1.0, "choice_temperature": 4.5},
}

ANCESTRAL_MODALITIES: dict[str, dict[str, Any]] = {
    "text": {"mask_schedule": "linear", "temperature": 1.0},
    "image": {"mask_schedule": "cosine", "temperature": 1.0},
}
