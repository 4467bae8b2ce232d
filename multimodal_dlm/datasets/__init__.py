"""Datasets: recipes, shards, manifests, and a reader whose order is a pure function of the seed."""

from multimodal_dlm.datasets.manifest import Manifest, ShardFile, Source, open_manifest
from multimodal_dlm.datasets.mixture import MixtureReader, TrainingExample
from multimodal_dlm.datasets.reading import ShardReader, iterate_samples
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample

__all__ = [
    "Manifest",
    "MixtureReader",
    "QuestionAnswer",
    "Record",
    "Sample",
    "ShardFile",
    "ShardReader",
    "Source",
    "TrainingExample",
    "iterate_samples",
    "open_manifest",
]
