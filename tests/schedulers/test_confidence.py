"""ConfidenceScheduler: order, noise, and the length rule in whole runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.schedulers.registry import logits_of, seeds_to_generators

EOS, FILL, COLUMNS = 0, 1, 6
GREEDY = {"words": {"eos_column": EOS, "fill_column": FILL}}
DRAWN = {"words": {**GREEDY["words"], "temperature": 1.3, "choice_temperature": 2.0}}


def finish(scheduler, sample, is_free, num_steps, seed, model=None):
    """Run one group to its end; returns the columns and the number of forwards."""
    model = model or (lambda columns: logits_of(columns, COLUMNS, seed) * 2)
    scheduler.set_timesteps(num_steps)
    state = scheduler.begin(sample, is_free, "words")
    generators = seeds_to_generators(range(seed, seed + len(sample)))
    num_forwards = 0
    for timestep in scheduler.timesteps:
        if not bool((is_free & (sample == COLUMNS)).any()):
            break
        sample = scheduler.step(
            model(sample), timestep, sample, state=state, is_free=is_free, generator=generators
        ).prev_sample
        num_forwards += 1
    return sample, num_forwards


def is_well_formed(row: list[int]) -> bool:
    """Content, one `<eos>`, then `<fill>`."""
    if row.count(EOS) != 1:
        return False
    end = row.index(EOS)
    return FILL not in row[:end] and row[end + 1 :] == [FILL] * (len(row) - end - 1)


@pytest.mark.parametrize("modalities", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@settings(max_examples=80, deadline=None)
@given(length=st.integers(1, 12), num_steps=st.integers(1, 14), seed=st.integers(0, 100_000))
def test_a_finished_window_is_content_one_eos_then_fill(modalities, length, num_steps, seed):
    sample = torch.full((3, length), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    final, num_forwards = finish(
        ConfidenceScheduler(modalities=modalities), sample, is_free, num_steps, seed
    )
    assert all(is_well_formed(row) for row in final.tolist())
    assert num_forwards <= min(num_steps, length)


@pytest.mark.parametrize("modalities", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 12),
    num_steps=st.integers(1, 14),
    share_known=st.sampled_from([0.2, 0.5, 0.8]),
    seed=st.integers(0, 100_000),
)
def test_any_part_of_a_window_may_be_known(modalities, length, num_steps, share_known, seed):
    """Known tokens, `<eos>` and `<fill>` among them, come from a well-formed window."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, length, (4, 1), generator=generator)
    truth = torch.randint(2, COLUMNS, (4, length), generator=generator)
    positions = torch.arange(length)
    truth = truth.masked_fill(positions == ends, EOS).masked_fill(positions > ends, FILL)
    is_known = torch.rand(4, length, generator=generator) < share_known
    sample = torch.where(is_known, truth, COLUMNS)
    final, _ = finish(
        ConfidenceScheduler(modalities=modalities), sample, ~is_known, num_steps, seed
    )
    assert torch.equal(final[is_known], truth[is_known])
    assert all(is_well_formed(row) for row in final.tolist())


def test_known_text_at_the_end_leaves_no_place_for_an_end():
    sample = torch.full((2, 5), COLUMNS)
    sample[:, -1] = 3
    is_free = sample == COLUMNS
    final, _ = finish(ConfidenceScheduler(modalities=GREEDY), sample, is_free, 3, 0)
    assert bool((final >= 2).all())


@pytest.mark.parametrize("length", [8, 16, 24])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 24])
def test_a_sure_model_writes_its_caption_into_any_window(length, num_steps):
    """A model that knows the caption, and is surest of the fill, writes it whatever the window."""
    caption = [4, 2, 5, 2, 3]
    truth = torch.tensor(caption + [EOS] + [FILL] * (length - len(caption) - 1))
    logits = torch.zeros(1, length, COLUMNS)
    logits[0, torch.arange(length), truth] = 5.0 + 0.1 * torch.arange(length)
    sample = torch.full((1, length), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    final, num_forwards = finish(
        ConfidenceScheduler(modalities=GREEDY), sample, is_free, num_steps, 0, lambda _: logits
    )
    assert final[0].tolist() == truth.tolist()
    assert num_forwards <= num_steps


@pytest.mark.parametrize("choice", [EOS, FILL, 3])
@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_a_model_with_one_word_never_deadlocks(choice, num_steps):
    sample = torch.full((1, 6), COLUMNS)
    logits = torch.zeros(1, 6, COLUMNS)
    logits[..., choice] = 9.0
    final, _ = finish(
        ConfidenceScheduler(modalities=GREEDY),
        sample, torch.ones_like(sample, dtype=torch.bool), num_steps, 0, lambda _: logits,
    )  # fmt: skip
    # A model of content alone is stopped by the end of the window, the others at its beginning.
    expected = [3] * 5 + [EOS] if choice == 3 else [EOS] + [FILL] * 5
    assert final[0].tolist() == expected


def peaked(choices: list[int], chances: list[float]) -> Tensor:
    """Logits of one row that give each position its choice with its chance."""
    probabilities = torch.full((1, len(choices), COLUMNS), 0.0)
    for position, (choice, chance) in enumerate(zip(choices, chances, strict=True)):
        probabilities[0, position] = (1 - chance) / (COLUMNS - 1)
        probabilities[0, position, choice] = chance
    return probabilities.log()


M = COLUMNS


@pytest.mark.parametrize(
    ("choices", "chances", "expected"),
    [
        ([2, 3, EOS, FILL], [0.6, 0.5, 0.7, 0.9], [M, M, EOS, FILL]),
        ([2, 3, EOS, FILL], [0.8, 0.5, 0.6, 0.9], [2, M, M, M]),
        ([2, EOS, FILL, FILL], [0.6, 0.5, 0.8, 0.9], [2, M, M, M]),
        ([2, EOS, 3, FILL], [0.5, 0.7, 0.9, 0.6], [M, EOS, FILL, FILL]),
        ([2, FILL, FILL, FILL], [0.3, 0.5, 0.7, 0.9], [2, M, M, M]),
        ([FILL, FILL, FILL, FILL], [0.3, 0.5, 0.7, 0.9], [EOS, FILL, FILL, FILL]),
        ([2, EOS, FILL, EOS], [0.5, 0.8, 0.6, 0.9], [M, EOS, FILL, FILL]),
    ],
    ids=[
        "eos lets fill stand",
        "fill is held back and counts in the plan",
        "only fill chosen: the best other token",
        "content right of eos gives way",
        "only fill chosen, one other",
        "nothing but fill: the first becomes eos",
        "the first of two ends wins",
    ],
)
def test_first_of_two_steps_by_hand(choices, chances, expected):
    """Four masks, two steps, linear: the plan takes the two most confident positions."""
    scheduler = ConfidenceScheduler(modalities=GREEDY)
    scheduler.set_timesteps(2)
    sample = torch.full((1, 4), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, "words")
    out = scheduler.step(peaked(choices, chances), 1.0, sample, state=state, is_free=is_free)
    assert out.prev_sample[0].tolist() == expected


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([2, FILL, 3, EOS], [2, EOS, FILL, FILL]),
        ([2, 3, EOS, 4], [2, 3, EOS, FILL]),
        ([2, 3, 4, 5], [2, 3, 4, EOS]),
    ],
)
def test_last_step_by_hand(choices, expected):
    sample = torch.full((1, 4), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    logits = peaked(choices, [0.9] * 4)
    final, _ = finish(
        ConfidenceScheduler(modalities=GREEDY), sample, is_free, 1, 0, lambda _: logits
    )
    assert final[0].tolist() == expected


def test_what_is_allowed_outranks_the_length_rule():
    """Neither `<eos>` nor `<fill>` allowed: a window full of content, without an end."""
    scheduler = ConfidenceScheduler(modalities=DRAWN)
    scheduler.set_timesteps(3)
    sample = torch.full((2, 6), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    allowed = torch.arange(COLUMNS) >= 2
    state = scheduler.begin(sample, is_free, "words")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(
            logits_of(sample, COLUMNS), timestep, sample, state=state, is_free=is_free,
            allowed=allowed, generator=seeds_to_generators([1, 2]),
        ).prev_sample  # fmt: skip
    assert bool(((sample >= 2) & (sample < COLUMNS)).all())


def test_without_noise_the_most_confident_positions_come_first():
    logits = peaked([2, 3, 4, 5, 2, 3], [0.5, 0.9, 0.3, 0.8, 0.6, 0.4])
    scheduler = ConfidenceScheduler(modalities={"words": {}})
    scheduler.set_timesteps(3)
    sample = torch.full((1, 6), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, "words")
    order = []
    for timestep in scheduler.timesteps:
        out = scheduler.step(logits, timestep, sample, state=state, is_free=is_free)
        order.append(out.committed[0].nonzero().flatten().tolist())
        sample = out.prev_sample
    assert order == [[1, 3], [0, 4], [2, 5]]
    assert sample[0].tolist() == [2, 3, 4, 5, 2, 3]


def test_confidence_is_of_the_drawn_token_at_temperature_one():
    """At a high temperature the unlikely draws are committed last, the likely ones first."""
    scheduler = ConfidenceScheduler(modalities={"words": {"temperature": 50.0, "top_k": 5}})
    scheduler.set_timesteps(2)
    logits = peaked([2] * 8, [0.9] * 8)
    sample = torch.full((40, 8), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, "words")
    out = scheduler.step(
        logits.expand(40, -1, -1), 1.0, sample, state=state, is_free=is_free,
        generator=seeds_to_generators(range(40)),
    )  # fmt: skip
    is_likely = out.pred_original_sample == 2
    assert bool(is_likely.any())
    assert not bool(is_likely.all())
    waits = (is_likely & ~out.committed).any(dim=1)
    assert not bool((waits[:, None] & out.committed & ~is_likely).any())


def test_strong_choice_noise_makes_the_order_uniform():
    logits = peaked([2, 3, 4, 5, 2, 3], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]).expand(200, -1, -1)
    scheduler = ConfidenceScheduler(modalities={"words": {"choice_temperature": 1e6}})
    scheduler.set_timesteps(2)
    sample = torch.full((200, 6), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, "words")
    out = scheduler.step(
        logits, 1.0, sample, state=state, is_free=is_free,
        generator=seeds_to_generators(range(200)),
    )  # fmt: skip
    share = out.committed.float().mean(dim=0)
    assert bool(((share - 0.5).abs() < 0.15).all())


@pytest.mark.parametrize(("num_steps", "time_left"), [(2, 0.5), (5, 0.8), (10, 0.9)])
def test_choice_noise_shrinks_with_the_time_left(num_steps, time_left):
    """P(the surer of two goes first) is logistic in the gap over the noise's scale."""
    count, scale = 4_000, 2.0
    logits = peaked([2, 2], [0.3, 0.9]).expand(count, -1, -1)
    scheduler = ConfidenceScheduler(modalities={"words": {"choice_temperature": scale}})
    scheduler.set_timesteps(num_steps)
    sample = torch.full((count, 2), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    state = scheduler.begin(sample, is_free, "words")
    out = scheduler.step(
        logits, 1.0, sample, state=state, is_free=is_free,
        generator=seeds_to_generators(range(count)),
    )  # fmt: skip
    assert bool((out.committed.sum(dim=1) == 1).all())
    expected = 1.0 / (1.0 + (0.3 / 0.9) ** (1.0 / (scale * time_left)))
    assert float(out.committed[:, 1].float().mean()) == pytest.approx(expected, abs=0.025)
