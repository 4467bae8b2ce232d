"""One discrete diffusion transformer for pictures and text, packaged as Diffusers pipelines.

Importing this package imports nothing heavy: a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal_dlm.canvas import Canvas
    from multimodal_dlm.errors import (
        BackendError,
        CanvasError,
        CheckpointError,
        ConfigError,
        DataError,
        DivergenceError,
        MultimodalDLMError,
        VocabularyError,
    )
    from multimodal_dlm.models.transformer import UnifiedTransformerModel
    from multimodal_dlm.pipelines import (
        UnifiedImageToTextPipeline,
        UnifiedInpaintPipeline,
        UnifiedJointPipeline,
        UnifiedTextGenerationPipeline,
        UnifiedTextToImagePipeline,
        load_pipeline,
    )
    from multimodal_dlm.processing import UnifiedProcessor
    from multimodal_dlm.schedulers import AbsorbingAncestralScheduler, ConfidenceScheduler
    from multimodal_dlm.tokenizers.image import ImageTokenizer
    from multimodal_dlm.vocabulary import UnifiedVocabulary

__version__ = "0.1.0"

__all__ = [
    "AbsorbingAncestralScheduler",
    "BackendError",
    "Canvas",
    "CanvasError",
    "CheckpointError",
    "ConfidenceScheduler",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "ImageTokenizer",
    "MultimodalDLMError",
    "UnifiedImageToTextPipeline",
    "UnifiedInpaintPipeline",
    "UnifiedJointPipeline",
    "UnifiedProcessor",
    "UnifiedTextGenerationPipeline",
    "UnifiedTextToImagePipeline",
    "UnifiedTransformerModel",
    "UnifiedVocabulary",
    "VocabularyError",
    "__version__",
    "load_pipeline",
]

_NAMES_BY_MODULE = {
    "canvas": ("Canvas",),
    "errors": (
        "BackendError",
        "CanvasError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DivergenceError",
        "MultimodalDLMError",
        "VocabularyError",
    ),
    "models.transformer": ("UnifiedTransformerModel",),
    "pipelines": (
        "UnifiedImageToTextPipeline",
        "UnifiedInpaintPipeline",
        "UnifiedJointPipeline",
        "UnifiedTextGenerationPipeline",
        "UnifiedTextToImagePipeline",
        "load_pipeline",
    ),
    "processing": ("UnifiedProcessor",),
    "schedulers": ("AbsorbingAncestralScheduler", "ConfidenceScheduler"),
    "tokenizers.image": ("ImageTokenizer",),
    "vocabulary": ("UnifiedVocabulary",),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` (PEP 562) and keep the name here."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
