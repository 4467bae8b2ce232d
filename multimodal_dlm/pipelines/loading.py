"""One function that loads any of our pipelines as the class its folder names."""

from pathlib import Path
from typing import Any

from multimodal_dlm.errors import CheckpointError, nearest_match
from multimodal_dlm.pipelines.hub import (
    HUB_OPTIONS,
    check_load_options,
    fetch_folder,
    read_index,
)
from multimodal_dlm.pipelines.image_to_text import UnifiedImageToTextPipeline
from multimodal_dlm.pipelines.inpaint import UnifiedInpaintPipeline
from multimodal_dlm.pipelines.joint import UnifiedJointPipeline
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.text_generation import UnifiedTextGenerationPipeline
from multimodal_dlm.pipelines.text_to_image import UnifiedTextToImagePipeline

PIPELINES: dict[str, type[UnifiedPipeline]] = {
    pipeline.__name__: pipeline
    for pipeline in (
        UnifiedTextToImagePipeline,
        UnifiedImageToTextPipeline,
        UnifiedTextGenerationPipeline,
        UnifiedJointPipeline,
        UnifiedInpaintPipeline,
    )
}


def load_pipeline(path_or_repo: str | Path, **kwargs: Any) -> UnifiedPipeline:
    """Load a pipeline as the class named in its `model_index.json`.

    Args:
        path_or_repo: Folder, or `owner/name` on the Hub.
        kwargs: As for `from_pretrained`.

    Raises:
        CheckpointError: When the folder names another class.
    """
    check_load_options(kwargs)
    hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    folder = fetch_folder(path_or_repo, **hub_options)
    name = str(read_index(folder).get("_class_name"))
    if name not in PIPELINES:
        raise CheckpointError(
            f"`{path_or_repo}` must hold one of our pipelines; its model_index.json names"
            f" `{name}`.{nearest_match(name, PIPELINES)} Available: {', '.join(PIPELINES)}."
        )
    return PIPELINES[name].from_pretrained(folder, **kwargs)
