"""Fréchet distance between two sets of features (FID, when the features are Inception's)."""

from __future__ import annotations

import torch
from torch import Tensor

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width
from calguide_fast.evaluation.statistics import feature_statistics


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (N, D) and (M, D).

    In squared units of the features; 0 for equal mean and covariance. It is biased upward when samples are few:
    compare only values computed from equally many. Source: Heusel et al., 2017 (FID).

    Raises ValueError for fewer than two samples, widths that differ, or values that are not finite.
    """
    a, b = as_features(features_a, "features_a", at_least=2), as_features(features_b, "features_b", at_least=2)
    check_same_width(a, b, "features_a", "features_b")
    return frechet_distance_from_statistics(*feature_statistics(a), *feature_statistics(b))


def frechet_distance_from_statistics(mu_a: ArrayLike, sigma_a: ArrayLike, mu_b: ArrayLike, sigma_b: ArrayLike) -> float:
    """|mu_a − mu_b|² + Tr(sigma_a + sigma_b − 2 (sigma_a sigma_b)^½), with means (D,) and covariances (D, D).

    With sigma_a = A Aᵀ and sigma_b = B Bᵀ the trace of the root is the sum of the singular values of Aᵀ B. These are
    exact to rounding even where they are zero, while an eigenvalue that should be zero has a root of 1e-8: singular
    covariances (fewer samples than features) need no special care.

    Raises ValueError for shapes that do not fit together or values that are not finite.
    """
    mu_a, sigma_a = _checked_moments(mu_a, sigma_a, "a")
    mu_b, sigma_b = _checked_moments(mu_b, sigma_b, "b")
    check_same_width(mu_a, mu_b, "mu_a", "mu_b")

    trace_root = torch.linalg.svdvals(_factor(sigma_a).T @ _factor(sigma_b)).sum()
    distance = (mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * trace_root
    # rounding alone can leave equal Gaussians a hair below zero
    return max(distance.item(), 0.0)


def _factor(sigma: Tensor) -> Tensor:
    """A (D, rank) with A Aᵀ = sigma, without the directions in which sigma is zero up to rounding."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()


def _checked_moments(mu: ArrayLike, sigma: ArrayLike, side: str) -> tuple[Tensor, Tensor]:
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
