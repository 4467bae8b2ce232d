"""Forward processes against their own transition matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.diffusion.forward_process import (
    FORWARD_PROCESSES,
    AbsorbingProcess,
    UniformProcess,
    get_forward_process,
)
from multimodal_dlm.diffusion.mask_schedules import MASK_SCHEDULES, get_mask_schedule
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import EXAMPLES, chi_square_z

COLUMNS = 4
TIMES = [0.0, 0.2, 0.55, 0.9, 1.0]
PAIRS = [(s, t) for s in TIMES for t in TIMES if s < t]


@pytest.fixture(params=[(name, m) for name in FORWARD_PROCESSES for m in MASK_SCHEDULES])
def process(request):
    name, mask_schedule = request.param
    return get_forward_process(name, num_columns=COLUMNS, mask_schedule=mask_schedule)


def test_transitions_are_laws_that_compose(process):
    for s, t in PAIRS:
        matrix = process.transition_matrix(s, t)
        assert bool((matrix >= 0).all())
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(process.num_states).double())
        torch.testing.assert_close(
            process.transition_matrix(0.0, s) @ matrix, process.transition_matrix(0.0, t)
        )
    eye = torch.eye(process.num_states, dtype=torch.float64)
    assert torch.equal(process.transition_matrix(0.0, 0.0), eye)
    assert torch.equal(process.transition_matrix(0.0, 1.0)[0], process.stationary())


def test_posteriors_sum_to_one_and_are_bayes(process):
    for s, t in PAIRS:
        until_s = process.transition_matrix(0.0, s)
        onward, until_t = process.transition_matrix(s, t), process.transition_matrix(0.0, t)
        for x_0 in range(COLUMNS):
            for x_t in range(process.num_states):
                if until_t[x_0, x_t] == 0:
                    continue
                found = process.posterior(
                    process.one_hot(torch.tensor(x_0)), torch.tensor(x_t), s, t
                )
                bayes = until_s[x_0] * onward[:, x_t] / until_t[x_0, x_t]
                torch.testing.assert_close(found, bayes, rtol=0, atol=1e-12)
                assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_the_reverse_step_is_the_posterior_mixed_over_the_clean_token(process, generator):
    law = torch.rand(3, 2, COLUMNS, generator=generator, dtype=torch.float64)
    law = law / law.sum(dim=-1, keepdim=True)
    columns = torch.tensor([[0, 3], [1, 1], [process.num_states - 1, 2]])
    found = process.posterior(law, columns, 0.3, 0.7)
    mixed = sum(
        law[..., x, None]
        * process.posterior(process.one_hot(torch.full_like(columns, x)), columns, 0.3, 0.7)
        for x in range(COLUMNS)
    )
    torch.testing.assert_close(found, mixed)
    assert found.shape == (3, 2, process.num_states)


def test_reverse_steps_with_the_true_law_recover_the_earlier_marginal(process):
    """sum over x_t of p(x_t) p(x_s | x_t) = p(x_s), with p(x_0 | x_t) by Bayes."""
    clean = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    for s, t in PAIRS:
        joint = clean[:, None] * process.transition_matrix(0.0, t)[:COLUMNS]
        marginal = joint.sum(dim=0)
        reached = marginal.nonzero().flatten()
        denoiser = (joint / marginal).T[reached]
        reverse = process.posterior(denoiser, reached, s, t)
        expected = clean @ process.transition_matrix(0.0, s)[:COLUMNS]
        torch.testing.assert_close(marginal[reached] @ reverse, expected)


def test_noise_is_drawn_from_the_marginal(process, generator):
    columns = torch.full((1, 8000), 1)
    is_free = torch.ones_like(columns, dtype=torch.bool)
    drawn = process.add_noise(columns, torch.tensor([0.5]), is_free=is_free, generator=generator)
    law = process.transition_matrix(0.0, 0.5)[1]
    counts = torch.bincount(drawn[0], minlength=process.num_states).double()
    assert bool((counts[law == 0] == 0).all())
    assert abs(chi_square_z(counts[law > 0], law[law > 0])) < 3.1
    none = process.add_noise(columns, torch.zeros(1), is_free=is_free, generator=generator)
    assert torch.equal(none, columns)
    full = process.add_noise(columns, torch.ones(1), is_free=is_free, generator=generator)
    share = torch.bincount(full[0], minlength=process.num_states).double() / 8000
    torch.testing.assert_close(share, process.stationary(), rtol=0, atol=0.03)


@EXAMPLES
@given(
    batch=st.integers(1, 5),
    length=st.integers(0, 9),
    seed=st.integers(0, 999),
    name=st.sampled_from(sorted(FORWARD_PROCESSES)),
)
def test_training_draws_keep_their_contract(batch, length, seed, name):
    generator = torch.Generator().manual_seed(seed)
    process = get_forward_process(name, num_columns=COLUMNS)
    columns = torch.randint(COLUMNS, (batch, length), generator=generator)
    kind = torch.randint(3, (batch, length), generator=generator)
    is_free, is_padding = kind == 0, kind == 2
    uniforms = torch.rand(batch, generator=generator, dtype=torch.float64)
    clean = columns.clone()
    output = process.corrupt(
        columns, uniforms, is_free=is_free, is_padding=is_padding, generator=generator
    )
    assert torch.equal(columns, clean)
    assert torch.equal(output.input_ids[~is_free], columns[~is_free])
    assert not bool((output.is_target & ~is_free).any())
    assert bool(((output.weight > 0) == output.is_target).all())
    assert bool(((output.noise_levels > 0) <= is_free).all())
    assert output.weight.dtype == output.noise_levels.dtype == torch.float32
    if name == "absorbing":
        assert torch.equal(output.is_target, output.input_ids == COLUMNS)
        for row in range(batch):
            free, masked = int(is_free[row].sum()), int(output.is_target[row].sum())
            assert masked == min(free, max(1, -int(-float(uniforms[row]) * free // 1)))
            if masked:
                assert float(output.weight[row].max()) == pytest.approx(free / masked)
                share = masked / int((~is_padding[row]).sum())
                assert float(output.noise_levels[row].max()) == pytest.approx(share)
    else:
        assert torch.equal(output.is_target, is_free)
        expected = is_free * uniforms.float()[:, None]
        torch.testing.assert_close(output.noise_levels, expected)


def test_the_same_generator_draws_the_same(process):
    columns = torch.arange(24).view(2, 12) % COLUMNS
    is_free = torch.ones_like(columns, dtype=torch.bool)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        half = torch.full((2,), 0.5)
        return process.corrupt(columns, half, is_free=is_free, generator=generator).input_ids

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_uniform_levels_follow_the_mask_schedule_and_not_the_tokens():
    process = UniformProcess(num_columns=3, mask_schedule="cosine")
    is_free = torch.tensor([[True, False, True]])
    levels = process.noise_levels(torch.tensor([0.25]), is_free=is_free)
    share = 1 - get_mask_schedule("cosine").alpha(0.25)
    torch.testing.assert_close(levels, torch.tensor([[share, 0.0, share]]))


def test_absorbing_levels_count_frozen_tokens_and_not_padding():
    process = AbsorbingProcess(num_columns=3)
    levels = process.noise_levels(
        torch.tensor([[3, 0, 3, 1, 0]]), is_padding=torch.tensor([[False] * 4 + [True]])
    )
    torch.testing.assert_close(levels, torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]]))


def test_wrong_arguments_are_explained():
    with pytest.raises(ConfigError, match="Did you mean `absorbing`"):
        get_forward_process("absorbin", num_columns=3)
    with pytest.raises(ConfigError, match="`num_columns` must be at least 1; got 0"):
        AbsorbingProcess(num_columns=0)
    process = UniformProcess(
        num_columns=3, mask_schedule="polynomial", mask_schedule_options={"power": 3.0}
    )
    for s, t in ((0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.2, 1.5)):
        with pytest.raises(ConfigError, match="0 <= s < t <= 1; got"):
            process.posterior(process.one_hot(torch.tensor(0)), torch.tensor(0), s, t)
    with pytest.raises(ConfigError, match="0 <= s <= t <= 1; got"):
        process.transition_matrix(0.9, 0.1)
