"""Fréchet distance between two sets of features (FID, when the features are Inception's)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width


class FeatureStatistics(NamedTuple):
    """Mean and unbiased covariance of features, both float64."""

    mu: torch.Tensor  # [D]
    sigma: torch.Tensor  # [D, D]


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D) of `features` (N, D).

    Raises ValueError for fewer than two samples, another shape, or values that are not finite.
    """
    return _statistics(features, "features")


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (N, D) and (M, D).

    In squared units of the features; 0 for equal mean and covariance. It is biased upward when samples are few:
    compare only values computed from equally many. Source: Heusel et al., 2017 (FID).

    Raises ValueError for fewer than two samples, widths that differ, or values that are not finite.
    """
    a, b = _statistics(features_a, "features_a"), _statistics(features_b, "features_b")
    check_same_width(a.mu, b.mu, "features_a", "features_b")
    return frechet_distance_from_statistics(*a, *b)


def frechet_distance_from_statistics(mu_a: ArrayLike, sigma_a: ArrayLike, mu_b: ArrayLike, sigma_b: ArrayLike) -> float:
    """|mu_a − mu_b|² + Tr(sigma_a + sigma_b − 2 (sigma_a sigma_b)^½), with means (D,) and covariances (D, D).

    The trace of the root is taken from the eigenvalues of the symmetric sigma_a^½ sigma_b sigma_a^½, which are those
    of sigma_a sigma_b, so that singular covariances (fewer samples than features) need no special care.

    Raises ValueError for shapes that do not fit together or values that are not finite.
    """
    mu_a, sigma_a = _checked_moments(mu_a, sigma_a, "a")
    mu_b, sigma_b = _checked_moments(mu_b, sigma_b, "b")
    check_same_width(mu_a, mu_b, "mu_a", "mu_b")

    values, vectors = torch.linalg.eigh(sigma_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root_a @ sigma_b @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * trace_root
    # rounding alone can leave equal Gaussians a hair below zero
    return max(distance.item(), 0.0)


def _statistics(features: ArrayLike, name: str) -> FeatureStatistics:
    table = as_features(features, name, at_least=2)
    mu = table.mean(0)
    centred = table - mu
    return FeatureStatistics(mu, centred.T @ centred / (len(table) - 1))


def _checked_moments(mu: ArrayLike, sigma: ArrayLike, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    mu = torch.as_tensor(mu).detach().to("cpu", torch.float64)
    sigma = torch.as_tensor(sigma).detach().to("cpu", torch.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"mu_{side} and sigma_{side} must have shapes (D,) and (D, D), "
            f"got {tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise ValueError(f"mu_{side} or sigma_{side} holds NaN or infinite values, statistics must be finite")
    return mu, (sigma + sigma.T) / 2
