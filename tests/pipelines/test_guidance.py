"""Guidance over the steps: intervals, schedules of the scale, and a loop by hand."""

import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines import UnifiedJointPipeline, UnifiedTextToImagePipeline
from multimodal_dlm.pipelines.guidance import Branch, guidance_share, scaled
from multimodal_dlm.pipelines.randomness import group_generators
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.registry import CASES, same
from tests.pipelines.test_denoising import guided, recorded, run
from tests.pipelines.tiny import seeded

every_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.pipeline is not UnifiedJointPipeline],
    ids=lambda case: case.pipeline.__name__,
)


@pytest.fixture
def pipe(make):
    return make(UnifiedTextToImagePipeline)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, [2.5] * 6),
        ({"guidance_schedule": "constant", "guidance_stop": 0.5}, [2.5] * 3 + [1.0] * 3),
        ({"guidance_schedule": "linear"}, [1.0, 1.3, 1.6, 1.9, 2.2, 2.5]),
        (
            {"guidance_schedule": "linear", "guidance_start": 0.3, "guidance_stop": 0.9},
            [1.0, 1.0, 1.0, 1.5, 2.0, 2.5],
        ),
        (
            {"guidance_schedule": "cosine"},
            [1.0, 1.14323725, 1.51823725, 1.98176275, 2.35676275, 2.5],
        ),
    ],
)
def test_every_guided_step_equals_the_manual_loop(pipe, options, scales):
    """u + g (c - u) of the canvas of the step before, computed and committed here by hand."""
    canvas = pipe.processor.text_to_image(["a red apple", "a green pear"])
    output, seen = recorded(pipe, canvas, branches=guided(pipe, 2.5), seeds=[5, 6], **options)
    assert output.num_forwards == 6 + sum(scale != 1.0 for scale in scales)
    vocabulary = pipe.transformer.vocabulary
    window = pipe.processor.image_windows[0]
    part = canvas.window_slice(window)

    def logits(branch):
        states = pipe.transformer(
            branch.input_ids,
            noise_levels=noise_levels(branch, vocabulary),
            modality_ids=branch.modality_ids,
            position_ids=branch.position_ids,
            attention_plan=AttentionPlan.from_canvas(branch),
        ).hidden_states[:, branch.window_slice(window)]
        return pipe.transformer.compute_logits(states, "image")

    is_free = canvas.is_free[:, part]
    scheduler = ConfidenceScheduler()
    scheduler.set_timesteps(6)
    state = scheduler.begin(
        vocabulary.to_columns(canvas.input_ids[:, part], "image"), is_free, "image"
    )
    generators = group_generators([5, 6], 1)[0]
    assert len(seen) == 6
    steps = zip(scheduler.timesteps, scales, [canvas, *seen[:-1]], seen, strict=True)
    for timestep, scale, before, after in steps:
        with torch.no_grad():
            c, u = logits(before), logits(pipe.processor.unconditional(before))
        stepped = scheduler.step(
            u + scale * (c - u),
            timestep,
            vocabulary.to_columns(before.input_ids[:, part], "image"),
            state=state,
            is_free=is_free,
            generator=generators,
        )
        expected = vocabulary.from_columns(stepped.prev_sample, "image")
        assert torch.equal(after.input_ids[:, part], expected)
    for other in ({"guidance_stop": 0.0}, {"guidance_schedule": "linear", "guidance_stop": 0.7}):
        changed = recorded(pipe, canvas, branches=guided(pipe, 2.5), seeds=[5, 6], **other)[1]
        assert not torch.equal(changed[-1].input_ids, seen[-1].input_ids)


@pytest.mark.parametrize(
    ("interval", "schedule", "shares"),
    [
        ((0.0, 1.0), "constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ((0.0, 1.0), "linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ((0.0, 1.0), "cosine", [0.0, 0.1464466, 0.5, 0.8535534, 1.0]),
        ((0.2, 0.8), "cosine", [0.0, 0.0, 0.5, 1.0, 0.0]),
        ((0.3, 0.5), "linear", [0.0, 0.0, 1.0, 0.0, 0.0]),
        ((0.5, 0.5), "linear", [0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_shares_run_from_the_first_guided_step_to_the_last(interval, schedule, shares):
    found = [guidance_share(step, 5, *interval, schedule) for step in range(5)]
    assert found == pytest.approx(shares, abs=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_weights_sum_to_one_at_every_share(pipe, share):
    canvas = pipe.processor.text_to_image(["a"])
    weights = {"text and picture": 3.0, "picture": -0.5, "nothing": -1.5}
    branches = [Branch(name, canvas, weight, (1,)) for name, weight in weights.items()]
    found = scaled(branches, share)
    assert sum(branch.weight for branch in found) == pytest.approx(1.0)
    expected = [1.0 + 2.0 * share, -0.5 * share, -1.5 * share]
    assert [branch.weight for branch in found] == expected[: len(found)]
    assert len(found) == (3 if share else 1)
    assert all(branch.windows == (1,) for branch in found)


def test_a_branch_of_some_windows_follows_the_schedule(make):
    """In joint runs the picture alone guides the picture; the caption is that of no guidance."""
    pipe = make(UnifiedJointPipeline)
    canvas = pipe.processor.joint(2, gen_length=6)
    window = pipe.processor.image_windows[0]

    def build(given):
        alone = pipe._picture_alone(given)
        return [Branch("cond", given, 3.0), Branch("uncond", alone, -2.0, (window,))]

    windows = {"text": (1.0, 0.5), "image": (0.5, 0.0)}
    options = {"steps": 12, "branches": build, "time_windows": windows}
    rising = run(pipe, canvas, guidance_schedule="linear", **options).canvas.input_ids
    constant, off = (
        run(pipe, canvas, guidance_stop=stop, **options).canvas.input_ids for stop in (1.0, 0.0)
    )
    picture = canvas.window_ids == window
    assert torch.equal(rising[~picture], off[~picture])
    assert not torch.equal(rising[picture], off[picture])
    assert not torch.equal(rising[picture], constant[picture])


@every_case
def test_every_pipeline_takes_a_schedule_and_constant_is_its_absence(make, case):
    pipe = make(case.pipeline)

    def call(**options):
        arguments = {**case.arguments(0, 1), **case.plain, "guidance_scale": 6.0}
        return pipe(**{**arguments, "generator": seeded(0, 1), **options}), pipe.num_forwards

    absent, constant, rising = (
        call(**options)
        for options in ({}, {"guidance_schedule": "constant"}, {"guidance_schedule": "cosine"})
    )
    assert absent[1] == constant[1] == rising[1] + 1
    assert same(absent[0], constant[0])
    assert not same(absent[0], rising[0])


@every_case
@pytest.mark.parametrize("schedule", ["exponential", "", None, 2.0, ["linear"]])
def test_other_schedules_are_refused(make, case, schedule):
    pipe = make(case.pipeline)
    message = (
        r"`guidance_schedule` must be one of `constant`, `linear`, `cosine`; got .*\. Leave it out"
    )
    with pytest.raises(ConfigError, match=message):
        pipe(**case.arguments(0), guidance_schedule=schedule)
