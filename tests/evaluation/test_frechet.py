from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from calguide_fast.evaluation import feature_statistics, frechet_distance, frechet_distance_from_statistics


def random_covariance(rank: int, width: int, seed: int) -> torch.Tensor:
    factor = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def test_commuting_gaussians_have_the_textbook_distance():
    rotation = torch.linalg.qr(random_covariance(6, 6, seed=1)).Q
    a, b = torch.tensor([4.0, 1, 0, 9, 2, 5]).double(), torch.tensor([1.0, 1, 3, 4, 0, 7]).double()
    mu = torch.arange(6).double()
    found = frechet_distance_from_statistics(mu, rotation * a @ rotation.T, mu + 0.5, rotation * b @ rotation.T)
    expected = 6 * 0.25 + (a.sqrt() - b.sqrt()).square().sum().item()
    assert found == pytest.approx(expected, rel=1e-6)  # roots of eigenvalues that are zero cost half the digits


def test_non_commuting_gaussians_agree_with_the_eigenvalues_of_the_product():
    sigma_a, sigma_b = random_covariance(9, 5, seed=2), random_covariance(9, 5, seed=3)
    mu = torch.zeros(5)
    roots = np.sqrt(np.linalg.eigvals((sigma_a @ sigma_b).numpy()).real)
    expected = (sigma_a.trace() + sigma_b.trace()).item() - 2 * roots.sum()
    assert frechet_distance_from_statistics(mu, sigma_a, mu, sigma_b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_from_statistics(mu, sigma_b, mu, sigma_a) == pytest.approx(expected, rel=1e-9)


def test_it_is_zero_for_equal_features_and_the_shift_squared_for_moved_ones():
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features.double() + 3) == pytest.approx(7 * 9, rel=1e-6)


def test_fewer_samples_than_features_stay_finite_real_and_silent():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 64, generator=generator), torch.randn(6, 64, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = frechet_distance(a, b)
    assert distance > 0 and distance == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_statistics_are_numpys():
    features = np.random.RandomState(0).randn(30, 4).astype(np.float32)
    mu, sigma = feature_statistics(features)
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "features_a has 1 samples"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "features_a has 3 features and features_b has 4"),
        (torch.zeros(5), torch.zeros(5, 4), "features_a must have shape"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "features_b holds NaN"),
    ],
)
def test_unusable_features_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_unusable_statistics_are_named():
    with pytest.raises(ValueError, match=r"mu_b and sigma_b must have shapes .* got \(3,\) and \(2, 2\)"):
        frechet_distance_from_statistics(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match="mu_a has 3 features and mu_b has 2"):
        frechet_distance_from_statistics(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="sigma_a holds NaN"):
        frechet_distance_from_statistics(torch.zeros(2), torch.eye(2) * torch.inf, torch.zeros(2), torch.eye(2))
