"""The squares of `toy.py` as shards, written once for each module, and the committed scenes."""

import pytest

from multimodal_dlm.datasets import Source, open_manifest
from tests.conftest import REPOSITORY
from tests.evaluation.toy import write_squares


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The only source of the manifest."""
    return open_manifest(write_squares(tmp_path_factory.mktemp("data"))).sources["squares"]


@pytest.fixture(scope="session")
def scenes():
    return open_manifest(REPOSITORY / "datasets/sample/emoji_scenes.yaml").sources["emoji_scenes"]
