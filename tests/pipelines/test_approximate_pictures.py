"""The cache by confidence under the picture pipelines: guidance, batches, holes, two windows."""

import pytest
import torch

from multimodal_dlm.models.approximate_cache import ConfidenceCacheConfig
from multimodal_dlm.pipelines import (
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedTextToImagePipeline,
)
from tests.pipelines.registry import CASES, plain
from tests.pipelines.tiny import seeded, tiny_components

PIPELINES = (UnifiedTextToImagePipeline, UnifiedInpaintPipeline, UnifiedJointPipeline)
DRAWING = [case for case in CASES if case.pipeline in PIPELINES]
ROWS = 3


@pytest.fixture(scope="module", params=["full", "prefix"])
def parts(request):
    """Components of a model whose condition sees the picture, or does not."""
    return tiny_components(condition_attention=request.param)


@pytest.mark.parametrize("case", DRAWING, ids=lambda case: case.pipeline.__name__)
def test_what_is_kept_is_what_the_threshold_admits(case, parts):
    """Nothing: the ids of the run without a cache. Anything: masks are computed but once."""
    pipe = case.pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    model, computed = pipe.transformer, []

    def draw(config=None):
        computed.clear()
        handle = model.blocks[0].register_forward_pre_hook(
            lambda _, inputs: computed.append(inputs[0].shape[1])
        )
        if config is not None:
            model.enable_cache(config)
        try:
            arguments = {**case.arguments(*range(ROWS)), **case.plain}
            output = plain(pipe(**arguments, generator=seeded(*range(ROWS))))
        finally:
            model.disable_cache()
            handle.remove()
        ids = [part.tolist() if isinstance(part, torch.Tensor) else part for part in output]
        return ids, sum(computed)

    expected, whole = draw()
    for config in (
        ConfidenceCacheConfig(threshold=1.0),
        ConfidenceCacheConfig(threshold=0.0, refresh_interval=1),
    ):
        assert draw(config)[0] == expected
    rough, some = draw(ConfidenceCacheConfig(threshold=0.0, refresh_interval=None))
    assert rough != expected
    assert some < 0.8 * whole
    between = draw(ConfidenceCacheConfig(threshold=0.5, refresh_interval=None))[1]
    assert some < between < whole
