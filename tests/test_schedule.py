"""Schedules, respacing and the coefficient table against published numbers and the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calguide_fast.ops.coefficients import ROW_LENGTH, Coefficient
from calguide_fast.schedule import Schedule, fractional_index, spaced_timesteps


def betas_of(schedule: Schedule) -> np.ndarray:
    bar = np.append(1.0, schedule.alphas_cumprod)
    return 1 - bar[1:] / bar[:-1]


def test_linear_schedule_is_ho_et_als():
    schedule = Schedule.linear()
    betas = betas_of(schedule)
    assert schedule.num_timesteps == 1000
    assert betas[[0, 999]] == pytest.approx([1e-4, 0.02], rel=1e-9)
    assert np.diff(betas) == pytest.approx(np.full(999, (0.02 - 1e-4) / 999), rel=1e-6)
    # ᾱ of the published schedule, from exact products
    assert schedule.alphas_cumprod[0] == pytest.approx(0.9999)
    assert schedule.alphas_cumprod[499] == pytest.approx(0.0785872429, rel=1e-8)
    assert schedule.alphas_cumprod[999] == pytest.approx(4.03582977e-5, rel=1e-8)


def test_linear_schedule_scales_with_its_length():
    assert betas_of(Schedule.linear(100))[[0, 99]] == pytest.approx([1e-3, 0.2])


def test_cosine_schedule_is_nichol_and_dhariwals():
    schedule = Schedule.cosine()
    betas = betas_of(schedule)

    def level(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    assert betas[0] == pytest.approx(1 - level(0.001) / level(0), rel=1e-9)
    assert betas[0] == pytest.approx(4.128e-5, rel=1e-3)
    assert betas[999] == pytest.approx(0.999)
    # up to where β is cut off, ᾱ is the cosine itself
    assert schedule.alphas_cumprod[499] == pytest.approx(level(0.5) / level(0), rel=1e-9)


def test_cumulative_products_are_the_products():
    betas = np.array([0.1, 0.2, 0.5])
    assert Schedule.from_betas(betas).alphas_cumprod == pytest.approx([0.9, 0.72, 0.36])
    for given in (list(betas), betas, torch.from_numpy(betas), torch.from_numpy(betas).float()):
        assert Schedule.of(given).alphas_cumprod == pytest.approx([0.9, 0.72, 0.36], rel=1e-6)
    kept = Schedule.linear()
    assert Schedule.of(kept) is kept


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0], "fall strictly"),
        ([0.1, 1.0], "between 0 and 1"),
        ([0.1, -0.1], "fall strictly"),
        ([0.1, math.nan], "between 0 and 1"),
        ([], "shape"),
        ([[0.1, 0.2]], "shape"),
    ],
)
def test_wrong_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("wrong", ["sigmoid", "Linear"])
def test_unknown_schedule(wrong):
    with pytest.raises(ValueError, match=f"schedule='{wrong}' must be 'linear', 'cosine'"):
        Schedule.of(wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_wrong_length(wrong):
    for make in (Schedule.linear, Schedule.cosine):
        with pytest.raises(ValueError, match=f"num_timesteps={wrong!r} must be a positive integer"):
            make(wrong)


def test_respacing_keeps_what_openai_keeps():
    kept = spaced_timesteps(1000, "250")
    assert kept[:4] == [0, 4, 8, 12] and kept[-2:] == [995, 999] and len(kept) == 250
    assert spaced_timesteps(1000, 250) == kept
    assert spaced_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert spaced_timesteps(1000, "1000") == list(range(1000))
    assert spaced_timesteps(1000, "1") == [0]


def test_respacing_in_sections():
    kept = spaced_timesteps(300, "10,15,20")
    thirds = [[t for t in kept if low <= t < low + 100] for low in (0, 100, 200)]
    assert [len(third) for third in thirds] == [10, 15, 20]
    # each section from its first timestep to its last
    assert [(third[0], third[-1]) for third in thirds] == [(0, 99), (100, 199), (200, 299)]
    assert thirds[0] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    uneven = spaced_timesteps(10, "2,2,2")
    assert uneven == [0, 3, 4, 6, 7, 9]


@pytest.mark.parametrize("steps", ["0", "-5", "abc", "", "10,", "ddim", "ddim0", "1.5", 2.5, True, None, "ddim10,20"])
def test_steps_that_are_not_understood(steps):
    with pytest.raises(ValueError, match="steps="):
        spaced_timesteps(1000, steps)


def test_steps_that_are_too_many():
    with pytest.raises(ValueError, match="steps=1001 asks for 1001 timesteps of a section that has 1000"):
        spaced_timesteps(1000, 1001)
    with pytest.raises(ValueError, match="no whole stride keeps exactly so many of 1000"):
        spaced_timesteps(1000, "ddim251")


def test_timeline_is_the_schedule_at_the_kept_steps():
    schedule = Schedule.linear()
    timeline = schedule.respaced("25")
    assert len(timeline) == 25
    assert timeline.alphas_cumprod == pytest.approx(schedule.alphas_cumprod[timeline.timesteps], rel=0)
    bar = timeline.alphas_cumprod
    assert timeline.sigmas == pytest.approx(np.sqrt((1 - bar) / bar))


@pytest.mark.parametrize("steps", ["25", "ddim10", "1", "2"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_coefficients_are_the_formulas(name, variance, eta, steps):
    timeline = Schedule.of(name).respaced(steps)
    table = timeline.coefficients(variance, eta)
    count = len(timeline)
    assert table.shape == (count, ROW_LENGTH) and table.dtype == torch.float32 and table.is_contiguous()
    assert table.isfinite().all()
    bars = [1.0, *timeline.alphas_cumprod.tolist()]
    beta = [1 - bars[k + 1] / bars[k] for k in range(count)]
    posterior = [beta[k] * (1 - bars[k]) / (1 - bars[k + 1]) for k in range(count)]
    for k in range(count):
        bar, bar_prev = bars[k + 1], bars[k]
        clipped = posterior[k] if k else (posterior[1] if count > 1 else beta[0])
        fixed = posterior[k] if variance == "fixed_small" else (beta[k] if k else clipped)
        noise_variance = clipped if variance == "fixed_small" else fixed
        sigma = eta * math.sqrt((1 - bar_prev) / (1 - bar)) * math.sqrt(1 - bar / bar_prev)
        expected = {
            Coefficient.SQRT_RECIP_ALPHAS_CUMPROD: math.sqrt(1 / bar),
            Coefficient.SQRT_RECIPM1_ALPHAS_CUMPROD: math.sqrt(1 / bar - 1),
            Coefficient.POSTERIOR_MEAN_X0: beta[k] * math.sqrt(bar_prev) / (1 - bar),
            Coefficient.POSTERIOR_MEAN_XT: (1 - bar_prev) * math.sqrt(1 - beta[k]) / (1 - bar),
            Coefficient.LOG_VARIANCE_MAX: math.log(beta[k]),
            Coefficient.LOG_VARIANCE_MIN: math.log(clipped),
            Coefficient.FIXED_VARIANCE: fixed,
            Coefficient.FIXED_NOISE_SCALE: math.sqrt(noise_variance),
            Coefficient.SQRT_ALPHAS_CUMPROD_PREV: math.sqrt(bar_prev),
            Coefficient.DDIM_DIRECTION: math.sqrt(max(1 - bar_prev - sigma**2, 0)),
            Coefficient.DDIM_SIGMA: sigma,
            Coefficient.SQRT_ONE_MINUS_ALPHAS_CUMPROD: math.sqrt(1 - bar),
            Coefficient.SINE: math.sin(math.pi * k / count),
            Coefficient.HAS_NOISE: float(k > 0),
            Coefficient.DRAW: count - k,
            Coefficient.TIMESTEP: int(timeline.timesteps[k]),
        }
        assert len(expected) == ROW_LENGTH
        for column, value in expected.items():
            assert table[k, column].item() == pytest.approx(value, rel=1e-6, abs=1e-8), (k, column)


def test_eta_one_is_ddpms_variance():
    timeline = Schedule.linear().respaced("50")
    row = timeline.coefficients("fixed_small", 1.0)
    assert row[:, Coefficient.DDIM_SIGMA] ** 2 == pytest.approx(row[:, Coefficient.FIXED_VARIANCE], rel=1e-6)


@pytest.mark.parametrize("eta", [-0.1, 50.0, math.nan, "1", True])
def test_wrong_eta(eta):
    with pytest.raises((ValueError, TypeError), match="eta"):
        Schedule.linear().respaced("25").coefficients(eta=eta)


def test_wrong_variance():
    with pytest.raises(ValueError, match="variance='learned' must be one of 'fixed_small', 'fixed_large'"):
        Schedule.linear().respaced("25").coefficients("learned")


def test_schedules_compare_by_identity():
    assert Schedule.linear() != Schedule.linear()
    assert len({Schedule.linear(), Schedule.linear()}) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_place_between_two_entries(length, dtype):
    table = torch.tensor([-2.0, 0.5, 0.75, 3.0, 3.5, 8.0, 64.0], dtype=dtype)[:length]
    x = torch.tensor([-math.inf, -3, -2, -1, 0.5, 0.7, 3, 3.4, 7.9, 8, 30, 64, 65, math.inf], dtype=dtype)
    found = fractional_index(table, x)
    assert found.dtype == dtype
    assert found.numpy() == pytest.approx(np.interp(x, table, np.arange(length)), abs=1e-6)
    # the entries' own are exact, so that whole timesteps stay whole
    assert fractional_index(table, table).tolist() == list(range(length))
    if length > 1:
        assert fractional_index(table, torch.tensor(math.nan, dtype=dtype)).isnan()
