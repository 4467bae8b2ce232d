"""Metrics, baselines and contact sheets, for reports and for samples during training."""

from multimodal_dlm.evaluation.baselines import (
    BlindAnswers,
    NearestPictures,
    pixel_features,
)
from multimodal_dlm.evaluation.sheets import contact_sheet, grid_sheet
from multimodal_dlm.evaluation.text_metrics import (
    exact_match,
    name_of_caption,
    normalise_text,
)

__all__ = [
    "BlindAnswers",
    "NearestPictures",
    "contact_sheet",
    "exact_match",
    "grid_sheet",
    "name_of_caption",
    "normalise_text",
    "pixel_features",
]
