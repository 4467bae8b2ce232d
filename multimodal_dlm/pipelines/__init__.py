"""Pipelines: build the canvas, denoise it, decode it. Five tasks over the same four components."""

from multimodal_dlm.pipelines.denoising import DenoisingOutput, denoise
from multimodal_dlm.pipelines.guidance import Branch, classifier_free
from multimodal_dlm.pipelines.image_metadata import read_recipe, save_image
from multimodal_dlm.pipelines.image_to_text import UnifiedImageToTextPipeline
from multimodal_dlm.pipelines.inpaint import UnifiedInpaintPipeline
from multimodal_dlm.pipelines.joint import UnifiedJointPipeline
from multimodal_dlm.pipelines.loading import load_pipeline
from multimodal_dlm.pipelines.model_card import CardInfo
from multimodal_dlm.pipelines.outputs import (
    UnifiedImageOutput,
    UnifiedJointOutput,
    UnifiedTextOutput,
)
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.randomness import RowSeeds
from multimodal_dlm.pipelines.text_generation import UnifiedTextGenerationPipeline
from multimodal_dlm.pipelines.text_to_image import UnifiedTextToImagePipeline

__all__ = [
    "Branch",
    "CardInfo",
    "DenoisingOutput",
    "RowSeeds",
    "UnifiedImageOutput",
    "UnifiedImageToTextPipeline",
    "UnifiedInpaintPipeline",
    "UnifiedJointOutput",
    "UnifiedJointPipeline",
    "UnifiedPipeline",
    "UnifiedTextGenerationPipeline",
    "UnifiedTextOutput",
    "UnifiedTextToImagePipeline",
    "classifier_free",
    "denoise",
    "load_pipeline",
    "read_recipe",
    "save_image",
]
