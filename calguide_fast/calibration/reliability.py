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

_CELLS_PER_BANDWIDTH = 64
_FEWEST_NEIGHBOURS = 0.1


class ReliabilityCurve(NamedTuple):
    """A reliability curve over m confidences from 0 to 1; float64 tensors on the CPU."""

    confidence: Tensor  # (m,) t
    accuracy: Tensor  # (m,) share of right answers among samples about that sure; NaN where there are none
    low: Tensor  # (m,) the bootstrap band of the accuracy
    high: Tensor  # (m,)
    density: Tensor  # (m,) of the confidences; integrates to 1
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

    accuracy(t) = Σ_i K_σ(t, f_i) y_i / Σ_i K_σ(t, f_i), density(t) = (1/n) Σ_i K_σ(t, f_i), K the Gaussian reflected at
    0 and 1, so that no mass is lost there. The accuracy is NaN where fewer than a tenth of a sample (a neighbour at
    distance d counts exp(−d²/2σ²)) is near. Samples are summed up in cells of σ/64 at their mean confidence, which
    moves the curve by some 1e-5 of itself; their number costs little.

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
    cells, places = _cells(f, y, sigma)
    grid = np.linspace(0, 1, points)
    kernel = reflected_gaussian(grid, places, sigma)
    density, accuracy = _smoothed(kernel, cells, sigma)
    low = high = np.full(points, np.nan)
    if bootstrap:
        resampled = np.random.default_rng(seed).multinomial(len(f), cells.ravel() / len(f), size=bootstrap)
        _, curves = _smoothed(kernel, resampled.reshape(bootstrap, *cells.shape).astype(np.float64), sigma)
        low, high = (_quantiles(curves, 0.5 + side * level / 2, where=~np.isnan(accuracy)) for side in (-1, 1))
    return ReliabilityCurve(
        confidence=torch.from_numpy(grid),
        accuracy=torch.from_numpy(accuracy),
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
    # the image of x behind k reflections lies some k away; 9σ is further than double precision sees
    reach = math.ceil(9 * sigma / 2)
    kernel = np.zeros((len(t), len(x)))
    for shift in range(-reach, reach + 1):
        for image in (x, -x):
            kernel += np.exp(-0.5 * ((t[:, None] - image - 2 * shift) / sigma) ** 2)
    return kernel / (sigma * math.sqrt(2 * math.pi))


def _cells(f: np.ndarray, y: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts (2, k) of wrong and right samples in the cells that hold any, and the cells' mean confidences (k,)."""
    cell = np.floor(f * _CELLS_PER_BANDWIDTH / sigma).astype(np.int64)
    _, cell = np.unique(cell, return_inverse=True)
    total = np.bincount(cell)
    right = np.bincount(cell, weights=y)
    return np.stack([total - right, right]), np.bincount(cell, weights=f) / total


def _smoothed(kernel: np.ndarray, cells: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Density and accuracy (..., m) of counts (..., 2, k), by a kernel (m, k)."""
    wrong, right = np.moveaxis(cells @ kernel.T, -2, 0)
    total = wrong + right
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    enough = total >= _FEWEST_NEIGHBOURS * peak
    accuracy = np.divide(right, total, out=np.full_like(total, np.nan), where=enough)
    return total / cells.sum((-2, -1), keepdims=True)[..., 0], accuracy


def _quantiles(curves: np.ndarray, q: float, where: np.ndarray) -> np.ndarray:
    """The quantile of each column's numbers; NaN elsewhere than `where`, and where a column has none."""
    chosen = where & ~np.isnan(curves).all(0)
    found = np.full(curves.shape[1], np.nan)
    found[chosen] = np.nanquantile(curves[:, chosen], q, axis=0)
    return found
