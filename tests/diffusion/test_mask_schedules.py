"""Every mask schedule against one contract."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.diffusion.mask_schedules import MASK_SCHEDULES, get_mask_schedule
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import EXAMPLES

CASES = {
    "linear": ("linear", {}, lambda t: t),
    "cosine": ("cosine", {}, lambda t: math.sin(math.pi * t / 2)),
    "square": ("polynomial", {}, lambda t: t**2),
    "root": ("polynomial", {"power": 0.5}, lambda t: t**0.5),
    "geometric": ("geometric", {}, lambda t: 1 - math.expm1(3 * (1 - t)) / math.expm1(3)),
    "steep": ("geometric", {"growth": 12}, lambda t: 1 - math.expm1(12 - 12 * t) / math.expm1(12)),
}


@pytest.fixture(params=CASES)
def case(request):
    name, options, rate = CASES[request.param]
    return get_mask_schedule(name, **options), rate


def test_every_schedule_is_in_the_table():
    assert {name for name, _, _ in CASES.values()} == set(MASK_SCHEDULES)


def test_values_are_the_published_formula(case):
    schedule, rate = case
    for i in range(101):
        assert schedule.alpha(i / 100) == pytest.approx(1 - rate(i / 100), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_endpoints_are_exact_and_alpha_decreases(case, dtype):
    schedule, _ = case
    assert (schedule.alpha(0.0), schedule.alpha(1.0)) == (1.0, 0.0)
    assert (schedule.inverse(1.0), schedule.inverse(0.0)) == (0.0, 1.0)
    alpha = schedule.alpha(torch.linspace(0, 1, 201, dtype=torch.float64).to(dtype))
    assert (alpha[0], alpha[-1]) == (1, 0)
    assert bool((alpha.diff() <= 0).all())
    assert alpha.dtype in (torch.float32, torch.float64)
    if dtype != torch.bfloat16:
        assert bool((alpha.diff() < 0).all())


@EXAMPLES
@given(t=st.floats(0.001, 0.999))
def test_derivative_is_the_finite_difference(t):
    for name, options, _ in CASES.values():
        schedule = get_mask_schedule(name, **options)
        step = 1e-6
        slope = (schedule.alpha(t + step) - schedule.alpha(t - step)) / (2 * step)
        assert schedule.alpha_derivative(t) == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert schedule.alpha_derivative(t) <= 0


@EXAMPLES
@given(t=st.floats(0.0, 1.0))
def test_inverse_returns_the_time(t):
    for name, options, _ in CASES.values():
        schedule = get_mask_schedule(name, **options)
        alpha = schedule.alpha(t)
        assert schedule.alpha(schedule.inverse(alpha)) == pytest.approx(alpha, abs=1e-12)
        if 0.01 < t < 0.8:  # elsewhere alpha, stored to 1e-16, may not tell two times apart
            assert schedule.inverse(alpha) == pytest.approx(t, abs=1e-9)


def test_floats_and_tensors_agree_and_derivative_matches_autograd(case):
    schedule, _ = case
    times = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(times)
    (slope,) = torch.autograd.grad(alpha.sum(), times)
    torch.testing.assert_close(slope, schedule.alpha_derivative(times.detach()))
    for t, value in zip(times.tolist(), alpha.tolist(), strict=True):
        assert schedule.alpha(t) == pytest.approx(value, abs=1e-14)
        assert isinstance(schedule.alpha(t), float)


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_shapes_are_kept(case, shape):
    schedule, _ = case
    for method in (schedule.alpha, schedule.alpha_derivative, schedule.inverse):
        assert method(torch.full(shape, 0.5)).shape == shape


def test_small_times_keep_their_precision():
    """1 - e^{..} written naively would keep four digits at t = 1e-12."""
    rate = get_mask_schedule("geometric").mask_rate(torch.tensor(1e-12, dtype=torch.float64))
    assert float(rate) == pytest.approx(3e-12 / (1 - math.exp(-3)), rel=1e-10)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, torch.tensor([0.5, 2.0])])
def test_times_outside_the_unit_interval_are_refused(case, value):
    schedule, _ = case
    for method in (schedule.alpha, schedule.alpha_derivative, schedule.inverse):
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]; got"):
            method(value)


def test_wrong_names_and_options_are_explained():
    with pytest.raises(ConfigError, match="Did you mean `cosine`"):
        get_mask_schedule("cosin")
    with pytest.raises(ConfigError, match="`geometric`, `linear`, `polynomial`"):
        get_mask_schedule("zzz")
    with pytest.raises(ConfigError, match="Did you mean `power`"):
        get_mask_schedule("polynomial", powers=2)
    with pytest.raises(ConfigError, match="Available: none"):
        get_mask_schedule("linear", power=2)
    for value in (0, -1.0, math.inf, math.nan, True):
        with pytest.raises(ConfigError, match="`power` must be a finite number above 0; got"):
            get_mask_schedule("polynomial", power=value)
    with pytest.raises(ConfigError, match="Use 3"):
        get_mask_schedule("geometric", growth=0)
