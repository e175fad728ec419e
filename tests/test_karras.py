"""Karras et al.'s noise levels, their timesteps, churn, and the solvers' table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calguide_fast.karras import ROW_LENGTH, Churn, KarrasLevels, Level, Solve
from calguide_fast.schedule import Schedule

LINEAR = Schedule.linear()


def test_levels_are_edms():
    """Where EDM's published sampler goes in 18 steps from 80 to 0.002."""
    levels = KarrasLevels.karras(18, 0.002, 80.0, LINEAR).sigmas
    assert len(levels) == 18 and levels[[0, -1]] == pytest.approx([0.002, 80.0])
    assert levels[[16, 15]] == pytest.approx([57.586, 40.786], rel=1e-4)
    assert np.diff(levels ** (1 / 7)) == pytest.approx(np.full(17, (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 17))
    assert KarrasLevels.karras(1, 0.002, 80.0, LINEAR).sigmas.tolist() == [80.0]


def test_timesteps_are_straight_lines_in_log_sigma():
    sigmas = LINEAR.sigmas
    assert sigmas == pytest.approx(np.sqrt((1 - LINEAR.alphas_cumprod) / LINEAR.alphas_cumprod))
    assert LINEAR.timesteps_at(sigmas) == pytest.approx(np.arange(1000))
    assert LINEAR.timesteps_at(np.sqrt(sigmas[1:] * sigmas[:-1])) == pytest.approx(np.arange(999) + 0.5)
    assert LINEAR.timesteps_at(np.array([1e-9, 1e9])).tolist() == [0.0, 999.0]


def test_churn_is_edms():
    sigmas = np.array([0.01, 0.1, 1.0, 10.0, 70.0])
    assert Churn().applied(sigmas) == pytest.approx(sigmas)
    assert Churn(1.0).applied(sigmas) == pytest.approx(1.2 * sigmas)
    assert Churn(80.0, s_tmin=0.1, s_tmax=10.0).applied(sigmas) / sigmas == pytest.approx([1, *[math.sqrt(2)] * 3, 1])


def test_table():
    levels = KarrasLevels.karras(5, 0.01, 50.0, LINEAR, Churn(1.0, s_noise=1.1))
    table, sigmas = levels.table().double(), levels.sigmas
    assert table.shape == (5, ROW_LENGTH) and levels.table().dtype == torch.float32 and len(levels) == 5
    for k in range(5):
        hat, following, row = 1.2 * sigmas[k], sigmas[k - 1] if k else 0.0, table[k].tolist()
        for at, sigma in ((0, hat), (4, following)):
            level = [sigma, 1 / math.sqrt(1 + sigma**2), sigma**2 / math.sqrt(1 + sigma**2)] if sigma else [0, 0, 0]
            assert [row[at + Level.SIGMA], row[at + Level.SHRINK], row[at + Level.PUSH]] == pytest.approx(level)
        assert row[Level.TIMESTEP] == pytest.approx(LINEAR.timesteps_at(np.array([hat]))[0])
        assert row[Solve.WAY] == pytest.approx(1 - following / hat)
        assert row[Solve.CHURN] == pytest.approx(1.1 * math.sqrt(hat**2 - sigmas[k] ** 2))
        assert row[Solve.HALF_STEP] == pytest.approx((following - hat) / following / 2 if k else 0.0)
        before, this = (
            math.log(a / b) if b else 0.0 for a, b in ((sigmas[min(k + 1, 4)], sigmas[k]), (sigmas[k], following))
        )
        assert row[Solve.EXTRAPOLATION] == pytest.approx(-this / before / 2 if 0 < k < 4 else 0.0)
        assert row[Solve.DECREASE] == pytest.approx(1 - (4 - k) / 6)
        assert row[Solve.SINE] == pytest.approx(math.sin(math.pi * (4 - k) / 5))


@pytest.mark.parametrize(
    "levels", [KarrasLevels.karras(4, 0.1, 9.0, LINEAR), LINEAR.respaced(4)], ids=["edm", "discrete"]
)
def test_renoising_goes_back_to_the_level(levels):
    """In variance, of an image without any; from each level to the one before it."""
    edm = isinstance(levels, KarrasLevels)
    variances = [0.0, *(levels.sigmas**2 if edm else 1 - levels.alphas_cumprod)]
    for k in range(4):
        signal, deviation = levels.renoising(k)
        assert signal**2 * variances[k] + deviation**2 == pytest.approx(variances[k + 1])
        expected = 1.0 if edm else math.sqrt(levels.alphas_cumprod[k] / ([1.0, *levels.alphas_cumprod][k]))
        assert signal == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 1.0), "steps=0 must be an integer, at least 1"),
        (("18", 0.1, 1.0), "steps='18' must be an integer"),
        ((4, 1.0, 0.1), "the noise levels from 1.0 to 0.1 must be finite, above 0 and rising"),
        ((4, 0.0, 0.1), "above 0"),
        ((4, 0.1, math.inf), "must be finite"),
    ],
)
def test_wrong_levels(arguments, message):
    with pytest.raises(ValueError, match=message):
        KarrasLevels.karras(*arguments, LINEAR)
