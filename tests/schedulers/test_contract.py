"""The contract every scheduler keeps, over all registered ones."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm import schedulers
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers import DiscreteScheduler, DiscreteSchedulerOutput
from tests.schedulers.registry import (
    MODALITIES,
    SCHEDULERS,
    logits_of,
    make_scheduler,
    masked_start,
    run,
    seeds_to_generators,
)

COLUMNS = 5
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def test_every_exported_scheduler_is_registered():
    exported = {getattr(schedulers, name) for name in schedulers.__all__}
    classes = {
        c for c in exported if issubclass(c, DiscreteScheduler) and c is not DiscreteScheduler
    }
    assert len(classes) >= 2
    assert classes == {cls for cls, _ in SCHEDULERS.values()}


@every_scheduler
@every_modality
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 12),
    num_steps=st.integers(1, 15),
    share_known=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_a_run_keeps_known_tokens_and_ends_without_masks(
    name, modality, length, num_steps, share_known, seed
):
    scheduler = make_scheduler(name)
    start, is_free = masked_start(3, length, COLUMNS, share_known, seed)
    before = start.clone()
    final, commits = run(
        scheduler, start, is_free, modality,
        num_columns=COLUMNS, num_inference_steps=num_steps, seeds=[1, 2, 3], seed=seed,
    )  # fmt: skip
    assert torch.equal(start, before)
    assert torch.equal(final[~is_free], start[~is_free])
    assert bool((final < COLUMNS).all())
    num_free = is_free.sum(dim=1)
    assert len(commits) <= min(num_steps, int(num_free.max()))
    remaining = num_free.clone()
    for committed in commits:
        assert not bool((committed & ~is_free).any())
        count = committed.sum(dim=1)
        assert bool((count[remaining > 0] >= 1).all())
        remaining = remaining - count
    assert bool((remaining == 0).all())


@every_scheduler
@every_modality
def test_same_generators_give_same_ids_and_others_do_not(name, modality):
    scheduler = make_scheduler(name)
    start, is_free = masked_start(4, 12, COLUMNS, 0.0, 0)
    options = {"num_columns": COLUMNS, "num_inference_steps": 6}
    first, _ = run(scheduler, start, is_free, modality, seeds=[1, 2, 3, 4], **options)
    again, _ = run(scheduler, start, is_free, modality, seeds=[1, 2, 3, 4], **options)
    other, _ = run(scheduler, start, is_free, modality, seeds=[5, 6, 7, 8], **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_scheduler
@every_modality
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    num_steps=st.integers(1, 14),
    share_known=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 10_000),
)
def test_a_batch_of_ragged_rows_equals_single_calls(
    name, modality, lengths, num_steps, share_known, seed
):
    """Shorter rows are padded on the right with void positions: masked, not free.

    The generators must also end in the same place, so that a later group draws the same.
    """
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(num_steps)
    width = max(lengths)
    start, is_free = masked_start(len(lengths), width, COLUMNS, share_known, seed)
    is_real = torch.arange(width) < torch.tensor(lengths)[:, None]
    start, is_free = start.masked_fill(~is_real, COLUMNS), is_free & is_real

    def finish(sample, free, indices):
        generators = seeds_to_generators([seed + index for index in indices])
        state = scheduler.begin(sample, free, modality)
        for timestep in scheduler.timesteps:
            if not bool((free & (sample == COLUMNS)).any()):
                break
            logits = torch.zeros(*sample.shape, COLUMNS, dtype=torch.float64)
            for row, index in enumerate(indices):
                length = lengths[index]
                logits[row, :length] = logits_of(sample[row : row + 1, :length], COLUMNS, seed)[0]
            output = scheduler.step(
                logits, timestep, sample, state=state, is_free=free, generator=generators
            )
            sample, state = output.prev_sample, output.state
        return sample, [torch.rand(1, generator=generator) for generator in generators]

    together, next_draws = finish(start, is_free, list(range(len(lengths))))
    for index, length in enumerate(lengths):
        alone, next_draw = finish(
            start[index : index + 1, :length], is_free[index : index + 1, :length], [index]
        )
        assert torch.equal(alone[0], together[index, :length])
        assert bool((together[index, length:] == COLUMNS).all())
        assert torch.equal(next_draw[0], next_draws[index])


@every_scheduler
@every_modality
def test_allowed_columns_are_honoured(name, modality):
    scheduler = make_scheduler(name)
    start, is_free = masked_start(6, 10, COLUMNS, 0.0, 0)
    generator = torch.Generator().manual_seed(3)
    allowed = torch.rand(6, 10, COLUMNS, generator=generator) < 0.4
    allowed[..., 3] |= ~allowed.any(dim=-1)
    final, _ = run(
        scheduler, start, is_free, modality,
        num_columns=COLUMNS, num_inference_steps=4, seeds=range(6), allowed=allowed,
    )  # fmt: skip
    assert bool(allowed.gather(-1, final[..., None]).all())
    only = torch.tensor([False, False, False, True, False])
    final, _ = run(
        scheduler, start, is_free, modality,
        num_columns=COLUMNS, num_inference_steps=4, seeds=range(6), allowed=only,
    )  # fmt: skip
    assert bool((final == 3).all())


@every_scheduler
def test_config_round_trips_through_json(name, tmp_path):
    scheduler = make_scheduler(name)
    cls = type(scheduler)
    again = cls.from_config(json.loads(scheduler.to_json_string()))
    assert again.config.modalities == scheduler.config.modalities
    assert json.loads(again.to_json_string()) == json.loads(scheduler.to_json_string())
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    start, is_free = masked_start(2, 8, COLUMNS, 0.0, 0)
    options = {"num_columns": COLUMNS, "num_inference_steps": 3, "seeds": [1, 2]}
    expected, _ = run(scheduler, start, is_free, "words", **options)
    found, _ = run(loaded, start, is_free, "words", **options)
    assert torch.equal(expected, found)


@every_scheduler
@pytest.mark.parametrize("other", SCHEDULERS)
def test_schedulers_can_be_exchanged_by_config(name, other):
    scheduler = make_scheduler(name)
    cls = SCHEDULERS[other][0]
    exchanged = cls.from_config(scheduler.config)
    assert exchanged.config.modalities == scheduler.config.modalities
    preset = cls.from_config(SCHEDULERS[name][0]().config)
    assert preset.config.modalities == cls().config.modalities


@every_scheduler
def test_timesteps_decrease_and_depend_on_the_number_alone(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.num_inference_steps == 4
    with pytest.raises(ConfigError, match=r"`num_inference_steps` must be a whole number.*got 0"):
        scheduler.set_timesteps(0)


@every_scheduler
@every_modality
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_inputs_of_any_float_type_are_left_as_they_were(name, modality, dtype):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(3)
    sample, is_free = masked_start(2, 7, COLUMNS, 0.3, 1)
    logits = logits_of(sample, COLUMNS).to(dtype)
    allowed = torch.ones(2, 7, COLUMNS, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, modality)
    inputs = (sample, is_free, logits, allowed, state.initial_sample)
    copies = [tensor.clone() for tensor in inputs]
    output = scheduler.step(
        logits, 1.0, sample, state=state, is_free=is_free, allowed=allowed,
        generator=seeds_to_generators([1, 2]),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert output.prev_sample.data_ptr() != sample.data_ptr()
    assert output.pred_logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_scheduler
def test_record_of_a_step(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(4)
    sample, is_free = masked_start(2, 9, COLUMNS, 0.3, 1)
    state = scheduler.begin(sample, is_free, "codes")
    options = {"state": state, "is_free": is_free}
    logits = logits_of(sample, COLUMNS)
    out = scheduler.step(
        logits, scheduler.timesteps[0], sample, generator=seeds_to_generators([1, 2]), **options
    )
    assert isinstance(out, DiscreteSchedulerOutput)
    as_tuple = scheduler.step(
        logits, scheduler.timesteps[0], sample, generator=seeds_to_generators([1, 2]),
        return_dict=False, **options,
    )  # fmt: skip
    assert len(as_tuple) == 6
    assert torch.equal(as_tuple[0], out.prev_sample)
    assert torch.equal(out.committed, (sample == COLUMNS) & (out.prev_sample < COLUMNS))
    assert not bool(out.revoked.any())
    assert bool((out.pred_original_sample < COLUMNS).all())
    known = sample < COLUMNS
    assert torch.equal(out.pred_original_sample[known], sample[known])
    assert torch.equal(out.prev_sample[out.committed], out.pred_original_sample[out.committed])
    assert torch.equal(out.pred_logits[known], logits[known])
    drawn = out.pred_logits.gather(-1, out.pred_original_sample[..., None])
    assert bool(drawn.isfinite().all())


@every_scheduler
@every_modality
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_step_from_the_logits_of_masked_positions_is_the_same_step(name, modality, is_allowed):
    sample, is_free = masked_start(3, 9, COLUMNS, 0.4, 2)
    is_free[0, ::3] = False  # Frozen masks, and a row that is finished.
    sample[1] = 2
    allowed = None
    if is_allowed:
        allowed = torch.rand(3, 9, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.5
        allowed[..., 2] = True
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(4)
    state = scheduler.begin(sample, is_free, modality)
    for timestep in scheduler.timesteps:
        logits = logits_of(sample, COLUMNS)
        options = {"state": state, "is_free": is_free, "allowed": allowed}
        expected = scheduler.step(
            logits, timestep, sample, generator=seeds_to_generators([1, 2, 3]), **options
        )
        found = scheduler.step_masked(
            logits[is_free & (sample == COLUMNS)], timestep, sample,
            generator=seeds_to_generators([1, 2, 3]), **options,
        )  # fmt: skip
        assert torch.equal(found.prev_sample, expected.prev_sample)
        assert torch.equal(found.pred_original_sample, expected.pred_original_sample)
        assert found.state.memory.keys() == expected.state.memory.keys()
        assert all(
            torch.equal(found.state.memory[k], expected.state.memory[k]) for k in found.state.memory
        )
        sample, state = found.prev_sample, found.state
    assert not bool((is_free & (sample == COLUMNS)).any())


@every_scheduler
def test_logits_of_other_positions_are_refused(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(2)
    sample, is_free = masked_start(2, 6, COLUMNS, 0.3, 1)
    state = scheduler.begin(sample, is_free, "codes")
    num_masked = int((is_free & (sample == COLUMNS)).sum())
    message = rf"`logits` must have shape \({num_masked}, columns\).*got \({num_masked + 1}, 5\)"
    with pytest.raises(ConfigError, match=message):
        scheduler.step_masked(
            torch.zeros(num_masked + 1, COLUMNS), 1.0, sample, state=state, is_free=is_free
        )


@every_scheduler
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 10])
def test_staggered_windows_wait_and_close_in_time(name, num_steps):
    modalities = {
        "words": {"temperature": 1.0, "start": 1.0, "stop": 0.5},
        "codes": {"temperature": 1.0, "start": 0.5, "stop": 0.0},
    }
    scheduler = make_scheduler(name, modalities)
    scheduler.set_timesteps(num_steps)
    generators = seeds_to_generators([1, 2])
    samples = {m: torch.full((2, 6), COLUMNS) for m in modalities}
    is_free = torch.ones(2, 6, dtype=torch.bool)
    states = {m: scheduler.begin(samples[m], is_free, m) for m in modalities}
    for index, timestep in enumerate(scheduler.timesteps):
        after = 1.0 - (index + 1) / num_steps
        for modality, sample in samples.items():
            out = scheduler.step(
                logits_of(sample, COLUMNS), timestep, sample,
                state=states[modality], is_free=is_free, generator=generators,
            )  # fmt: skip
            has_begun = after < modalities[modality]["start"]
            assert scheduler.has_begun(timestep, states[modality]) == has_begun
            was_masked = (sample == COLUMNS).any(dim=1)
            assert bool((out.committed.any(dim=1) == (was_masked & has_begun)).all())
            samples[modality] = out.prev_sample
            if after <= modalities[modality]["stop"]:
                assert bool((out.prev_sample < COLUMNS).all())
    assert all(bool((sample < COLUMNS).all()) for sample in samples.values())


@every_scheduler
def test_a_group_may_have_its_own_time_window(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(4)
    sample, is_free = masked_start(1, 8, COLUMNS, 0.0, 0)
    state = scheduler.begin(sample, is_free, "codes", start=0.5, stop=0.25)
    begun = [scheduler.has_begun(t, state) for t in scheduler.timesteps]
    assert begun == [False, False, True, True]
    out = scheduler.step(
        logits_of(sample, COLUMNS), 0.5, sample, state=state, is_free=is_free,
        generator=seeds_to_generators([1]),
    )  # fmt: skip
    assert bool((out.prev_sample < COLUMNS).all())
    with pytest.raises(ConfigError, match=r"stop < start <= 1; got start 0.2 and stop 0.25"):
        scheduler.begin(sample, is_free, "codes", start=0.2, stop=0.25)


@every_scheduler
def test_a_window_without_positions_or_free_ones_passes_through(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(2)
    for shape in ((2, 0), (2, 3)):
        sample = torch.full(shape, 2, dtype=torch.long)
        is_free = torch.zeros(shape, dtype=torch.bool)
        state = scheduler.begin(sample, is_free, "words")
        out = scheduler.step(
            torch.zeros(*shape, COLUMNS), 1.0, sample, state=state, is_free=is_free
        )
        assert torch.equal(out.prev_sample, sample)
        assert not bool(out.committed.any())


@every_scheduler
def test_the_state_moves_with_the_canvas(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(5)
    sample, is_free = masked_start(3, 8, COLUMNS, 0.3, 4)
    state = scheduler.begin(sample, is_free, "codes")
    index = torch.tensor([2, 0])
    moved = state.map_tensors(lambda tensor: tensor[index])
    out = scheduler.step(
        logits_of(sample[index], COLUMNS), 1.0, sample[index], state=moved,
        is_free=is_free[index], generator=seeds_to_generators([3, 1]),
    )  # fmt: skip
    whole = scheduler.step(
        logits_of(sample, COLUMNS), 1.0, sample, state=state, is_free=is_free,
        generator=seeds_to_generators([1, 2, 3]),
    )  # fmt: skip
    assert torch.equal(out.prev_sample, whole.prev_sample[index])


@every_scheduler
@every_modality
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("top_k", [None, 1, 2, 50])
@pytest.mark.parametrize("top_p", [None, 0.3, 1.0])
@pytest.mark.parametrize("mask_schedule", ["linear", "geometric"])
def test_option_pairs(name, modality, temperature, top_k, top_p, mask_schedule):
    modalities = {
        modality: {
            **MODALITIES[modality], "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "mask_schedule": mask_schedule,
        }
    }  # fmt: skip
    scheduler = make_scheduler(name, modalities)
    start, is_free = masked_start(2, 6, COLUMNS, 0.2, 1)
    final, _ = run(
        scheduler, start, is_free, modality,
        num_columns=COLUMNS, num_inference_steps=3, seeds=[1, 2],
    )  # fmt: skip
    assert bool((final < COLUMNS).all())


@pytest.mark.parametrize("mask_schedule", ["linear", "cosine", "polynomial", "geometric"])
@pytest.mark.parametrize("name", ["confidence", "absorbing_ancestral"])
def test_counts_follow_the_mask_schedule(name, mask_schedule):
    """Left masked: floor(N0 (1 - alpha)), computed here from the formulas of the mask rates."""
    rates = {
        "linear": lambda t: t,
        "cosine": lambda t: torch.sin(torch.pi * t / 2),
        "polynomial": lambda t: t**2,
        "geometric": lambda t: 1 - torch.expm1(3 * (1 - t)) / torch.expm1(torch.tensor(3.0)),
    }
    options = {"mask_schedule_options": {"power": 2.0}} if mask_schedule == "polynomial" else {}
    scheduler = make_scheduler(
        name, {"codes": {"temperature": 1.0, "mask_schedule": mask_schedule, **options}}
    )
    start, is_free = masked_start(1, 60, COLUMNS, 0.0, 0)
    _, commits = run(
        scheduler, start, is_free, "codes", num_columns=COLUMNS, num_inference_steps=5, seeds=[1]
    )
    left = 60 - torch.stack([c.sum() for c in commits]).cumsum(dim=0)
    after = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
    assert left.tolist() == torch.floor(60 * rates[mask_schedule](after) + 1e-6).long().tolist()


@every_scheduler
def test_messages_of_step_and_begin(name):
    scheduler = make_scheduler(name)
    sample, is_free = masked_start(2, 4, COLUMNS, 0.0, 0)
    logits = logits_of(sample, COLUMNS)
    state = scheduler.begin(sample, is_free, "codes")
    options = {"state": state, "is_free": is_free, "generator": seeds_to_generators([1, 2])}
    with pytest.raises(ConfigError, match="`set_timesteps` must be called before `step`"):
        scheduler.step(logits, 1.0, sample, **options)
    scheduler.set_timesteps(3)
    with pytest.raises(ConfigError, match=r"Unknown modality `code`\. Did you mean `codes`\?"):
        scheduler.begin(sample, is_free, "code")
    for wrong in (0.5, 0.0, 2.0, float("nan")):
        with pytest.raises(ConfigError, match=r"`timestep` must be one of `timesteps`"):
            scheduler.step(logits, wrong, sample, **options)
    with pytest.raises(ConfigError, match=r"`model_output` must have shape \(2, 4\)"):
        scheduler.step(logits[:, :3], 1.0, sample, **options)
    with pytest.raises(ConfigError, match=r"`is_free` must have shape \(2, 4\); got \(2, 3\)"):
        scheduler.step(logits, 1.0, sample, **{**options, "is_free": is_free[:, :3]})
    with pytest.raises(ConfigError, match=r"one `torch.Generator` per row, 2; got 1"):
        scheduler.step(logits, 1.0, sample, **{**options, "generator": seeds_to_generators([1])})
    with pytest.raises(ConfigError, match=r"one `torch.Generator` per row, 2; got none"):
        scheduler.step(logits, 1.0, sample, **{**options, "generator": None})
    with pytest.raises(ConfigError, match=r"`allowed` must be broadcastable to \(2, 4, 5\)"):
        scheduler.step(logits, 1.0, sample, allowed=torch.ones(3, dtype=torch.bool), **options)
    stuck = torch.ones(2, 4, COLUMNS, dtype=torch.bool)
    stuck[1, 2] = False
    with pytest.raises(ConfigError, match=r"at least one column.*row 1, position 2"):
        scheduler.step(logits, 1.0, sample, allowed=stuck, **options)
    far = make_scheduler(name, {"codes": {"eos_column": 0, "fill_column": 5}})
    far.set_timesteps(3)
    state = far.begin(sample, is_free, "codes")
    with pytest.raises(ConfigError, match=r"`fill_column` of modality `codes`.*columns, 5; got 5"):
        far.step(logits, 1.0, sample, **{**options, "state": state})
