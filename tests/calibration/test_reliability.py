from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic import predictions

from calguide_fast import smooth_ece
from calguide_fast.calibration import reliability_curve, top_label
from calguide_fast.calibration.reliability import reflected_gaussian


def saturated(count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the confidences exactly 1, a few exactly 0."""
    generator = torch.Generator().manual_seed(1)
    f = torch.rand(count, generator=generator, dtype=torch.float64)
    f[: count // 2] = 1
    f[-20:] = 0
    return f, torch.rand(count, generator=generator, dtype=torch.float64) < 0.8 * f + 0.1


CASES = {
    "smooth": top_label(*predictions(3000, overconfidence=2.0)),
    "saturated": saturated(),
    "few": (torch.tensor([0.2, 0.9, 0.97]), torch.tensor([1, 0, 1])),
    "one": (torch.tensor([0.3]), torch.tensor([True])),
}


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0])
def test_the_kernel_keeps_all_mass_and_is_the_cosine_series(sigma):
    t = np.linspace(0, 1, 20001)
    x = np.array([0.0, 0.003, 0.4, 1.0])
    kernel = reflected_gaussian(t, x, sigma)
    np.testing.assert_allclose(np.trapezoid(kernel, t, axis=0), 1, atol=1e-6)
    k = np.arange(1, int(10 / sigma) + 2)[:, None, None]
    series = 1 + 2 * np.sum(
        np.exp(-0.5 * (sigma * np.pi * k) ** 2) * np.cos(np.pi * k * t[::1000, None]) * np.cos(np.pi * k * x), axis=0
    )
    np.testing.assert_allclose(kernel[::1000], series, atol=1e-9 / sigma)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bandwidth", [None, 0.02, 0.2])
def test_it_is_the_definition_sample_by_sample(name, bandwidth):
    f, y = CASES[name]
    curve = reliability_curve(f, y, bandwidth, points=101, bootstrap=0)
    assert curve.low.isnan().all() and curve.samples == len(f)
    places, right = f.double().numpy(), y.double().numpy()
    t, sigma = np.linspace(0, 1, 101), curve.bandwidth
    kernel = reflected_gaussian(t, places, sigma)
    np.testing.assert_allclose(curve.t, t)
    np.testing.assert_allclose(curve.density, kernel.mean(1), rtol=2e-4, atol=1e-6)
    seen = ~np.isnan(curve.accuracy.numpy())
    expected = kernel.sum(1) * sigma * np.sqrt(2 * np.pi) >= 0.1
    assert (seen == expected).mean() > 0.98  # a point at the threshold may fall on either side
    np.testing.assert_allclose(curve.accuracy[seen], (kernel @ right / kernel.sum(1))[seen], atol=1e-4)
    np.testing.assert_allclose(curve.confidence[seen], (kernel @ places / kernel.sum(1))[seen], atol=1e-4)


@pytest.mark.parametrize("name", ["smooth", "saturated"])
def test_the_gap_weighted_by_the_density_is_the_smooth_ece(name):
    f, y = CASES[name]
    curve = reliability_curve(f, y, points=4001, bootstrap=0)
    gap = ((curve.accuracy - curve.confidence).abs() * curve.density).nan_to_num()
    area = torch.trapezoid(gap, curve.t).item()
    assert area == pytest.approx(curve.smooth_ece, rel=2e-3)
    assert curve.smooth_ece == pytest.approx(smooth_ece(f.double(), y).value.item(), abs=1e-9)
    assert torch.trapezoid(curve.density, curve.t).item() == pytest.approx(1, abs=1e-4)


def test_a_known_accuracy_lies_inside_the_band():
    generator = torch.Generator().manual_seed(3)
    f = torch.rand(4000, generator=generator)
    truth = f**2
    curve = reliability_curve(f, torch.rand(4000, generator=generator) < truth, bandwidth=0.03)
    inner = slice(40, -40)
    t = curve.t[inner]
    share = ((curve.low[inner] <= t**2 - t) & (t**2 - t <= curve.high[inner])).double().mean()
    assert share > 0.8  # 95 % at each place; neighbours share their fate
    assert ((curve.high - curve.low)[inner] < 0.15).all()
    assert (curve.low <= curve.accuracy - curve.confidence).all()
    assert (curve.accuracy - curve.confidence <= curve.high).all()


def test_the_band_widens_with_its_level_and_narrows_with_samples():
    f, y = CASES["smooth"]

    def width(count, level):
        curve = reliability_curve(f[:count], y[:count], bandwidth=0.05, level=level)
        return (curve.high - curve.low)[250:].mean()

    assert width(3000, 0.5) < 0.6 * width(3000, 0.95)
    assert width(3000, 0.95) < 0.6 * width(600, 0.95)


def test_the_same_seed_gives_the_same_band_in_any_order():
    f, y = CASES["smooth"]
    first, again, other = (reliability_curve(f, y, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.low.nan_to_num(), again.low.nan_to_num())
    assert not torch.equal(first.low.nan_to_num(), other.low.nan_to_num())
    flipped = reliability_curve(f.flip(0), y.flip(0))
    torch.testing.assert_close(flipped.accuracy, first.accuracy, rtol=0, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(flipped.high, first.high, rtol=0, atol=1e-9, equal_nan=True)


def test_arrays_and_half_precision_are_served():
    f, y = CASES["smooth"]
    expected = reliability_curve(f, y, bootstrap=0)
    assert reliability_curve(f.numpy(), y.numpy(), bootstrap=0).smooth_ece == expected.smooth_ece
    assert reliability_curve(f.half(), y, bootstrap=0).smooth_ece == pytest.approx(expected.smooth_ece, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 1}, "points=1 must be"),
        ({"bootstrap": -1}, "bootstrap=-1 must be"),
        ({"level": 1.5}, "level=1.5 must be"),
        ({"bandwidth": -0.1}, "bandwidth=-0.1 must be"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        reliability_curve(*CASES["few"], **settings)


def test_unusable_predictions_are_named():
    with pytest.raises(ValueError, match=r"confidence\[1\]=1.2"):
        reliability_curve(np.array([0.5, 1.2]), np.array([0, 1]))
    with pytest.raises(ValueError, match="correct has shape"):
        reliability_curve(np.array([0.5, 0.2]), np.array([0]))
    with pytest.raises(TypeError, match="confidence has dtype torch.int64"):
        reliability_curve(np.array([0, 1]), np.array([0, 1]))
