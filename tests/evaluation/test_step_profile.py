"""The information profile: against enumeration of masks, and of a model that knows the answer."""

import itertools
import math
from itertools import pairwise

import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.evaluation import step_profile
from multimodal_dlm.evaluation.step_profile import (
    measure_step_profile,
    predicted_errors,
    schedule_sizes,
)
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.pipelines.scoring import masked_nll
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.tiny import tiny_components
from tests.schedulers.registry import masked_start, run


@pytest.fixture(scope="module")
def pipe():
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def enumerated(pipe, source, share, task):
    """Mean nll of the masked tokens of every row over all masks with a share known."""
    transformer, vocabulary = pipe.transformer, pipe.transformer.vocabulary
    rng = step_profile.np.random.default_rng(0)
    samples = list(step_profile.iterate_samples(source, "test"))
    canvas = step_profile._canvas(pipe, source, samples, task, rng)
    means = []
    for row in range(canvas.batch_size):
        places = canvas.is_free[row].nonzero()[:, 0].tolist()
        known = int(torch.tensor(share * (len(places) - 1)).round())
        for masked in itertools.combinations(places, len(places) - known):
            ids = canvas.input_ids[row : row + 1].clone()
            modality = list(vocabulary.modalities)[int(canvas.modality_ids[row, places[0]])]
            ids[0, list(masked)] = vocabulary.mask_token_id(modality)
            noisy = canvas.select_rows(slice(row, row + 1)).replace(input_ids=ids)
            output = transformer(
                ids,
                noise_levels=noise_levels(noisy, vocabulary),
                modality_ids=noisy.modality_ids,
                position_ids=noisy.position_ids,
                attention_plan=AttentionPlan.from_canvas(noisy),
            )
            states = output.hidden_states[0, list(masked)]
            logs = transformer.compute_logits(states, modality).double().log_softmax(dim=-1)
            columns = vocabulary.to_columns(canvas.input_ids[row, list(masked)], modality)
            means.append((row, float(-logs.gather(-1, columns[:, None]).mean())))
    rows = [[value for index, value in means if index == row] for row in range(canvas.batch_size)]
    return sum(sum(values) / len(values) for values in rows) / len(rows)


@torch.no_grad()
def test_the_ends_of_the_profile_need_no_luck(pipe, source):
    """With nothing known there is one mask only; the mean over rows must be exact."""
    profile = measure_step_profile(pipe, source, split="test", num_points=2)
    assert profile.modality == "image"
    assert profile.num_tokens == 16
    assert profile.num_rows == 3
    expected = enumerated(pipe, source, 0.0, "text_to_image")
    assert profile.values[0] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_the_mean_over_masks_is_that_of_all_masks(pipe, source):
    """One token masked of sixteen: seeds average to the mean over all places."""
    task = "unconditional_image"  # No caption is drawn.
    expected = enumerated(pipe, source, 1.0, task)
    found = [
        measure_step_profile(pipe, source, split="test", task=task, num_points=2, seed=s).values[1]
        for s in range(60)
    ]
    mean = sum(found) / len(found)
    variance = sum((value - mean) ** 2 for value in found) / (len(found) - 1)
    assert variance > 0
    assert abs(mean - expected) < 4 * (variance / len(found)) ** 0.5


@pytest.mark.parametrize("task", step_profile.TASKS)
def test_every_task_has_a_profile(pipe, source, task):
    profile = measure_step_profile(pipe, source, split="test", task=task, num_points=3)
    assert len(profile.values) == 3
    assert all(math.isfinite(value) and value >= 0 for value in profile.values)
    has_image = task in ("text_to_image", "unconditional_image")
    assert profile.modality == ("image" if has_image else "text")


def test_the_same_seed_measures_the_same(pipe, source):
    options = {"split": "test", "num_points": 3, "batch_size": 2, "seed": 4}
    first = measure_step_profile(pipe, source, **options)
    assert first == measure_step_profile(pipe, source, **options)


def test_what_is_known_only_grows_and_rows_can_be_passed_over(pipe, source, monkeypatch):
    masks = []

    def noted(model, canvas, is_target):
        masks.append(is_target)
        return masked_nll(model, canvas, is_target)

    monkeypatch.setattr(step_profile, "masked_nll", noted)
    options = {"split": "test", "task": "unconditional_image", "num_points": 5}
    whole = measure_step_profile(pipe, source, **options)
    assert [int(mask[0].sum()) for mask in masks] == [16, 12, 8, 5, 1]
    for before, after in pairwise(masks):
        assert bool((after <= before).all())
    rest = measure_step_profile(pipe, source, skip=1, **options)
    assert (whole.num_rows, rest.num_rows) == (3, 2)
    with pytest.raises(DataError, match=r"in split `test` beyond the first 3"):
        measure_step_profile(pipe, source, skip=3, **options)


def test_refusals(pipe, source):
    with pytest.raises(ConfigError, match=r"Unknown task `captions`. Did you mean `caption`"):
        measure_step_profile(pipe, source, split="test", task="captions")
    with pytest.raises(ConfigError, match=r"`num_points` must be 2 or more; got 1"):
        measure_step_profile(pipe, source, split="test", num_points=1)
    with pytest.raises(DataError, match=r"split `val`"):
        measure_step_profile(pipe, source, split="val")


@pytest.mark.parametrize("name", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize(("num_tokens", "num_steps"), [(64, 8), (16, 16), (7, 5), (30, 1)])
def test_schedule_sizes_are_those_of_the_scheduler(name, num_tokens, num_steps):
    scheduler = ConfidenceScheduler(modalities={"codes": {"mask_schedule": name}})
    start, is_free = masked_start(1, num_tokens, 5, 0.0, 0)
    _, commits = run(
        scheduler, start, is_free, "codes",
        num_columns=5, num_inference_steps=num_steps, seeds=[1],
    )  # fmt: skip
    found = [int(committed.sum()) for committed in commits]
    assert schedule_sizes(name, num_tokens, num_steps) == found


def test_the_plan_is_predicted_to_be_the_best():
    table = predicted_errors([7.0, 3.0, 2.0, 1.5, 1.4], 64)
    assert set(table) == {"linear", "cosine", "geometric", "planned"}
    for count in ("4", "8", "12", "16"):
        assert table["planned"][count] == min(row[count] for row in table.values())
        assert table["planned"][count] > 0
