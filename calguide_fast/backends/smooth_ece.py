"""The smooth ECE in plain PyTorch and float64: what ``reference`` offers, and what the kernels are tested against.

The Gaussian kernel reflected at 0 and 1 is a cosine series, K_σ(t, f) = 1 + 2 Σ_k e_k cos πkt cos πkf with
e_k = exp(−σ²π²k²/2), so the residuals r_i = f_i − y_i enter through their moments c_k = Σ_i w_i r_i cos πkf_i alone:

    R(t) = c_0 + 2 Σ_k e_k c_k cos πkt,    ∫ |R| = c_0 s_0 + 2 Σ_k e_k c_k s_k,    s_k = ∫ sign R(t) cos πkt dt,

where s_k is known from the places at which R changes sign. These places move with σ and f, but as R is 0 there, the
integral's derivatives are those at fixed s_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calguide_fast.backends.outcomes import check_outcomes

# the bandwidth does not go below
LEAST_BANDWIDTH = 1e-3
# the series ends at k = CUTOFF / σ, with e_k = 1e-17
CUTOFF = 2.8
# R is looked at on this many points per σ for its changes of sign
POINTS = 32
# |R| below this share of its largest value is rounding, which has no sign
ROUNDING = 1e-12
# elements of the largest intermediate
CHUNK = 1 << 22


@torch.no_grad()
def smooth_ece(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Value and bandwidth (2,), and the gradient (n,) or (0,), in the confidences' dtype; bandwidth 0: the fixpoint."""
    if confidence.device.type == "cpu":
        check_outcomes(confidence, correct, weights)
    f = confidence.double()
    w = torch.ones_like(f) if weights is None else weights.double()
    # where it is not checked above, what is not allowed shows as NaN
    allowed = (f >= 0) & (f <= 1) & (w >= 0)
    w = (w / w.sum()).where(allowed.all(), torch.nan)
    if not bool(w.isfinite().all()):
        return confidence.new_full((2,), math.nan), torch.full_like(confidence, math.nan)[: with_gradient * len(f)]
    curve = _Residuals(f, f - correct.double(), w)
    sigma = bandwidth or curve.fixpoint()
    value, slope, sine = curve.integral(sigma)
    stats = torch.tensor([value, sigma], dtype=confidence.dtype, device=confidence.device)
    if not with_gradient:
        return stats, confidence.new_empty(0)
    at_fixpoint = bandwidth == 0.0 and sigma > LEAST_BANDWIDTH
    grad = curve.gradient(sigma, sine) / (1 - slope if at_fixpoint else 1)
    return stats, grad.to(confidence.dtype)


class _Residuals:
    """R of the residuals r at confidences f with weights w, for any bandwidth."""

    def __init__(self, f: Tensor, r: Tensor, w: Tensor) -> None:
        self.f, self.r, self.w = f, r, w
        self.moments = f.new_empty(0)

    def fixpoint(self) -> float:
        """The σ with ∫ |R_σ| = σ, or LEAST_BANDWIDTH where it is less."""
        # the integral falls with σ, so the fixpoint lies between any σ and the integral there
        low, high = LEAST_BANDWIDTH, 1.0
        sigma = 0.1
        for _ in range(100):
            value, slope, _ = self.integral(sigma)
            if value == 0:
                return LEAST_BANDWIDTH
            if abs(value - sigma) < 1e-14 or (sigma == low and value <= low):
                break
            low, high = max(low, min(sigma, value)), min(high, max(sigma, value))
            sigma += (value - sigma) / (1 - slope)
            if sigma < low == LEAST_BANDWIDTH:
                sigma = low
            elif not low <= sigma <= high:
                sigma = (low + high) / 2
        return sigma

    def integral(self, sigma: float) -> tuple[float, float, Tensor]:
        """∫ |R|, its derivative by σ, and the sine moments s_k, (K + 1,)."""
        series, k = self.series(sigma)
        places, sign = _sign_changes(series, sigma)
        ends = torch.cat([series.new_zeros(1), places, series.new_ones(1)])
        signs = sign * (1 - 2.0 * (torch.arange(len(ends) - 1, device=ends.device) % 2).to(ends))
        # s_k = Σ over the intervals of their sign times ∫ cos πkt
        jumps = torch.cat([signs[:1], signs.diff(), -signs[-1:]])
        sine = -_sum_over(jumps, ends, k, torch.sin) / (torch.pi * k).clamp(min=1)
        sine[0] = (signs * ends.diff()).sum()
        terms = series * sine
        return float(terms.sum()), float(-(sigma * (torch.pi * k) ** 2 * terms).sum()), sine

    def gradient(self, sigma: float, sine: Tensor) -> Tensor:
        """∂/∂f_i ∫ |R| = w_i (S(f_i) + r_i S′(f_i)), S = K_σ ∗ sign R, (n,)."""
        k = torch.arange(len(sine), dtype=sine.dtype, device=sine.device)
        series = _doubled(_damping(sigma, k) * sine)
        slope = -torch.pi * k * series
        return self.w * (_evaluate(series, self.f, torch.cos) + self.r * _evaluate(slope, self.f, torch.sin))

    def series(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Coefficients of R's cosine series, and their k."""
        count = math.ceil(CUTOFF / sigma) + 1
        k = torch.arange(count, dtype=self.f.dtype, device=self.f.device)
        known = len(self.moments)
        if known < count:
            self.moments = torch.cat([self.moments, _sum_over(self.w * self.r, self.f, k[known:], torch.cos)])
        return _doubled(_damping(sigma, k) * self.moments[:count]), k


def _damping(sigma: float, k: Tensor) -> Tensor:
    return (-0.5 * (sigma * torch.pi * k) ** 2).exp()


def _doubled(series: Tensor) -> Tensor:
    """Of a cosine series, every term but the first counts twice."""
    return torch.cat([series[:1], 2 * series[1:]])


def _sum_over(values: Tensor, places: Tensor, k: Tensor, wave: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ_i values_i wave(π k places_i) for every k."""
    step = max(1, CHUNK // len(k))
    total = torch.zeros_like(k)
    for v, t in zip(values.split(step), places.split(step)):
        total += v @ wave(torch.pi * t[:, None] * k)
    return total


def _evaluate(series: Tensor, places: Tensor, wave: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ_k series_k wave(π k places_i) for every i."""
    k = torch.arange(len(series), dtype=series.dtype, device=series.device)
    step = max(1, CHUNK // len(k))
    return torch.cat([wave(torch.pi * t[:, None] * k) @ series for t in places.split(step)])


def _sign_changes(series: Tensor, sigma: float) -> tuple[Tensor, float]:
    """Where the cosine series changes sign within (0, 1), and its sign before the first place (0: it is 0)."""
    intervals = max(POINTS, math.ceil(POINTS / sigma))
    grid = torch.linspace(0, 1, intervals + 1, dtype=series.dtype, device=series.device)
    r = _evaluate(series, grid, torch.cos)
    seen = r.abs() > ROUNDING * r.abs().max()
    grid, sign = grid[seen], r[seen].sign()
    if not len(sign):
        return grid, 0.0
    change = sign[1:] != sign[:-1]
    low, high, before = grid[:-1][change], grid[1:][change], sign[:-1][change]
    for _ in range(50 if len(before) else 0):
        middle = (low + high) / 2
        below = _evaluate(series, middle, torch.cos).sign() == before
        low, high = low.where(~below, middle), high.where(below, middle)
    return (low + high) / 2, float(sign[0])
