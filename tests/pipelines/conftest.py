"""Tiny real components, shared by the tests of pipelines."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from multimodal_dlm.pipelines import UnifiedPipeline
from tests.pipelines.tiny import tiny_components


@pytest.fixture(scope="session")
def components() -> dict[str, Any]:
    """The four components; tests may not change them."""
    return tiny_components()


@pytest.fixture
def make(components: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Build a quiet pipeline of a class over the shared components, which tests leave as found."""

    def replaced() -> dict[str, set[str]]:
        """Methods that an instance has of its own."""
        return {
            name: {own for own in vars(part) if callable(getattr(type(part), own, None))}
            for name, part in components.items()
        }

    found = replaced()

    def build(pipeline: type[UnifiedPipeline], **changed: Any) -> UnifiedPipeline:
        made = pipeline(**{**components, **changed})
        made.set_progress_bar_config(disable=True)
        return made

    yield build
    assert replaced() == found
