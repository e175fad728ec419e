"""Reliability: how often a classifier is right, as a smooth function of how sure it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calguide_fast.ops import checks
from calguide_fast.ops.smooth_ece import smooth_ece

ArrayLike = Tensor | np.ndarray

_CELLS_PER_BANDWIDTH = 32
_FEWEST_NEIGHBOURS = 0.1


class ReliabilityCurve(NamedTuple):
    """What the samples about each of m places t are like; float64 tensors on the CPU."""

    t: Tensor  # (m,) from 0 to 1
    confidence: Tensor  # (m,) mean confidence about t; NaN where there are no samples
    accuracy: Tensor  # (m,) share of right answers about t; NaN where there are no samples
    low: Tensor  # (m,) the bootstrap band of the gap accuracy − confidence
    high: Tensor  # (m,)
    density: Tensor  # (m,) of the confidences at t; integrates to 1
    smooth_ece: float
    bandwidth: float  # σ of the kernel
    mean_confidence: float
    mean_accuracy: float
    samples: int


def reliability_curve(
    confidence: ArrayLike,
    correct: ArrayLike,
    bandwidth: float | None = None,
    *,
    points: int = 401,
    bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> ReliabilityCurve:
    """Kernel-smoothed accuracy over confidence, at the smooth ECE's own bandwidth.

    With K the Gaussian reflected at 0 and 1, so that no mass is lost there,

        density(t) = (1/n) Σ_i K_σ(t, f_i),  confidence(t), accuracy(t) = means of f_i and y_i weighted by K_σ(t, f_i),

    so that the gap between the two, ∫ |accuracy − confidence| density dt, is the smooth ECE itself, and a calibrated
    classifier's accuracy(t) is its confidence(t). (That is not t wherever the density is steep: near 1, most samples of
    a saturated classifier are on one side.) Both are NaN where less than a tenth of a sample is near,
    one at distance d counted as exp(−d²/2σ²). Samples of one outcome are summed up in cells of σ/32 at their mean
    confidence, which blurs K by less than 1e-4 of its width.

    Args:
        confidence: (n,) in 0..1, tensor or array; n ≥ 1.
        correct: (n,) bool or numbers 0 and 1.
        bandwidth: σ, or None for the one at which σ and the smooth ECE agree.
        points: m ≥ 2, evenly spaced.
        bootstrap: resamplings behind the band, at the same σ; 0 for none (the band is then NaN).
        level: share of the resamplings that the band holds at each t by itself.
        seed: of the resampling.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, no samples, a confidence outside 0..1 or NaN, outcomes other than
            0 and 1, or a setting out of range.

    Source: Błasiok & Nakkiran, ICLR 2024, arXiv 2309.12236.
    """
    for name, number, least in (("points", points, 2), ("bootstrap", bootstrap, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}={number!r} must be an integer, at least {least}")
    level = checks.number("level", level, low=0.0, high=1.0)
    confidence, correct = (torch.as_tensor(values).detach().cpu() for values in (confidence, correct))
    checks.floating("confidence", confidence)
    value, sigma = (float(figure) for figure in smooth_ece(confidence.double(), correct, bandwidth))

    f, y = confidence.double().numpy(), correct.double().numpy()
    cells = _cells(f, y, sigma)
    grid = np.linspace(0, 1, points)
    kernel = reflected_gaussian(grid, cells.place, sigma)
    density, confidences, accuracies = _smoothed(kernel, cells, cells.samples, sigma)
    low = high = np.full(points, np.nan)
    if bootstrap:
        resampled = np.random.default_rng(seed).multinomial(len(f), cells.samples / len(f), size=bootstrap)
        _, near, right = _smoothed(kernel, cells, resampled, sigma)
        seen = ~np.isnan(accuracies)
        low, high = (_quantiles(right - near, 0.5 + side * level / 2, seen) for side in (-1, 1))
    return ReliabilityCurve(
        t=torch.from_numpy(grid),
        confidence=torch.from_numpy(confidences),
        accuracy=torch.from_numpy(accuracies),
        low=torch.from_numpy(low),
        high=torch.from_numpy(high),
        density=torch.from_numpy(density),
        smooth_ece=value,
        bandwidth=sigma,
        mean_confidence=f.mean().item(),
        mean_accuracy=y.mean().item(),
        samples=len(f),
    )


def reflected_gaussian(t: np.ndarray, x: np.ndarray, sigma: float) -> np.ndarray:
    """K_σ(t, x), (len(t), len(x)): the Gaussian about x with its tails folded back into 0..1."""
    # images 1, 2, … to the left and right fill one unit each; 9σ is further than double precision sees
    reach = 1 + math.floor(9 * sigma)
    kernel = np.zeros((len(t), len(x)))
    for unit in range(-reach, reach + 1):
        image = unit + (x if unit % 2 == 0 else 1 - x)
        kernel += np.exp(-0.5 * ((t[:, None] - image) / sigma) ** 2)
    return kernel / (sigma * math.sqrt(2 * math.pi))


class _Cells(NamedTuple):
    """Samples of one outcome that lie close together, k groups of them."""

    place: np.ndarray  # (k,) mean confidence
    right: np.ndarray  # (k,) the outcome, 0.0 or 1.0
    samples: np.ndarray  # (k,) how many


def _cells(f: np.ndarray, y: np.ndarray, sigma: float) -> _Cells:
    cell = np.floor(f * _CELLS_PER_BANDWIDTH / sigma).astype(np.int64)
    kinds, cell = np.unique(2 * cell + (y == 1), return_inverse=True)
    count = np.bincount(cell)
    return _Cells(np.bincount(cell, weights=f) / count, kinds % 2.0, count)


def _smoothed(
    kernel: np.ndarray, cells: _Cells, count: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Density, confidence and accuracy (..., m) of so many samples (..., k) in the cells, by a kernel (m, k)."""
    # in floating point the products are BLAS's
    total, confidence, right = (count * value @ kernel.T for value in (1.0, cells.place, cells.right))
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    total_or_nan = np.where(total >= _FEWEST_NEIGHBOURS * peak, total, np.nan)
    return total / count.sum(-1, keepdims=True), confidence / total_or_nan, right / total_or_nan


def _quantiles(curves: np.ndarray, q: float, seen: np.ndarray) -> np.ndarray:
    """The quantile of each column's numbers; NaN where it has none, or none were `seen`."""
    chosen = seen & ~np.isnan(curves).all(0)
    found = np.full(curves.shape[1], np.nan)
    found[chosen] = np.nanquantile(curves[:, chosen], q, axis=0)
    return found
