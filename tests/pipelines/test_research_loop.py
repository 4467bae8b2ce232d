"""The benchmark's research loop computes what the pipeline computes, where neither draws."""

import importlib
from pathlib import Path

import pytest
import torch

from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.tiny import GRID, seeded, tiny_components

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROMPTS = ["a red apple on a white background", "a green pear"]
STEPS = 5


@pytest.fixture
def make_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("research_loop").ResearchLoop


@pytest.fixture
def pipeline():
    """Greedy, in float64: other kernels and padded rows round otherwise in float32."""
    greedy = ConfidenceScheduler(modalities={"image": {"mask_schedule": "cosine"}})
    pipe = UnifiedTextToImagePipeline(**{**tiny_components(), "scheduler": greedy})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def codes_of(draw, **options):
    (codes,) = draw(PROMPTS, output_type="codes", generator=seeded(0, 1), **options).images
    return codes


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_ids_are_the_same(make_loop, pipeline, guidance_scale):
    loop = make_loop(pipeline, dtype=torch.float64, num_steps=STEPS, guidance_scale=guidance_scale)
    found = codes_of(loop)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS}
    assert torch.equal(found, codes_of(pipeline, **options))
    assert found.unique().numel() > 3
    other = codes_of(pipeline, **{**options, "num_inference_steps": 1})
    assert not torch.equal(found, other)


def test_it_draws_from_one_generator(make_loop, pipeline):
    settings = {
        "dtype": torch.float64,
        "guidance_scale": 2.0,
        "temperature": 1.0,
        "choice_temperature": 4.5,
    }
    loop = make_loop(pipeline, num_steps=STEPS, **settings)
    first, again, other = (
        loop(PROMPTS, output_type="codes", generator=generator).images[0]
        for generator in seeded(0, 0, 1)
    )
    assert first.shape == (len(PROMPTS), *GRID)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= int(first.min()) <= int(first.max()) < 48
    assert loop(PROMPTS, generator=seeded(0)[0]).images[0].size == (32, 32)
