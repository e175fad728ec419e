"""The smooth ECE in plain PyTorch and float64: what ``reference`` offers, and what the kernels are tested against.

The Gaussian kernel reflected at 0 and 1 is a cosine series, K_σ(t, f) = 1 + 2 Σ_k e_k cos πkt cos πkf with
e_k = exp(−σ²π²k²/2), so the residuals r_i = f_i − y_i enter through their moments c_k = Σ_i w_i r_i cos πkf_i alone:

    R(t) = c_0 + 2 Σ_k e_k c_k cos πkt,    ∫ |R| = c_0 s_0 + 2 Σ_k e_k c_k s_k,    s_k = ∫ sign R(t) cos πkt dt,

where s_k is known from the places at which R changes sign. These places move with σ and f, but as R is 0 there, the
integral's derivatives are those at fixed s_k.

Cosines and sines are the parts of e^{iπkt}, and these for all k are the products of a few with each other, so that sums
over them are products of matrices; on an even grid they are a Fourier transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calguide_fast.backends.outcomes import LEAST_TOTAL, MOST_TOTAL, check_outcomes

# the bandwidth does not go below
LEAST_BANDWIDTH = 1e-3
# the series ends at k = CUTOFF / σ, with e_k = 1e-17
CUTOFF = 2.8
# what a measurement leaves for its gradient, in float64, on every backend: σ, the gradient's factor (NaN where nothing
# could be measured), and the cosine series of S = K_σ ∗ sign R, then zeros
CURVE_LENGTH = 2 + math.ceil(CUTOFF / LEAST_BANDWIDTH) + 1
# R is looked at on this many points per σ for its changes of sign
POINTS = 32
# |R| below this share of its largest value is rounding, which has no sign
ROUNDING = 1e-12
# a moment below this share of the residuals' absolute sum is 0
CANCELLED = 1e-15
# a step of the search for a place that is shorter is the last
CLOSE = 1e-13
# elements of the largest intermediate
CHUNK = 1 << 22


@torch.no_grad()
def smooth_ece(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and bandwidth in the confidences' dtype, and what the gradient needs (CURVE_LENGTH,) or (0,).

    Bandwidth 0: the fixpoint.
    """
    if confidence.device.type == "cpu":
        check_outcomes(confidence, correct, weights)
    f = confidence.double()
    w = torch.ones_like(f) if weights is None else weights.double()
    # where it is not checked above, what is not allowed shows as NaN
    allowed = (f >= 0) & (f <= 1) & (w >= 0)
    total = w.sum()
    total = total.where(allowed.all() & (total >= LEAST_TOTAL) & (total <= MOST_TOTAL), torch.nan)
    curve = f.new_zeros(CURVE_LENGTH if with_curve else 0)
    if not bool((w / total).isfinite().all()):
        return confidence.new_full((), math.nan), confidence.new_full((), math.nan), curve.fill_(math.nan)
    residuals = _Residuals(f, f - correct.double(), w / total)
    sigma = bandwidth or residuals.fixpoint()
    value, slope, sine = residuals.integral(sigma)
    if with_curve:
        at_fixpoint = bandwidth == 0.0 and sigma > LEAST_BANDWIDTH
        curve[0] = sigma
        curve[1] = 1 / (total * (1 - slope if at_fixpoint else 1))
        curve[2 : 2 + len(sine)] = _doubled(_damping(sigma, _multiples(sine)) * sine)
    return confidence.new_tensor(value), confidence.new_tensor(sigma), curve


@torch.no_grad()
def smooth_ece_gradient(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor
) -> Tensor:
    """The gradient of the value that `curve` was left for times `value_grad`, (n,) in the confidences' dtype.

    At a fixed σ it is ∂/∂f_i ∫ |R| = w_i (S(f_i) + r_i S′(f_i)) / Σ_i w_i; through the fixpoint, that over
    1 − ∂/∂σ ∫ |R|.
    """
    sigma, factor, series = curve[0], value_grad.double() * curve[1], curve[2:]
    if not sigma.isnan():
        series = series[: math.ceil(CUTOFF / float(sigma)) + 1]
    f = confidence.double()
    value, slope = _evaluate(_with_derivatives(series, 1), f)
    grad = factor * (value + (f - correct.double()) * slope)
    return (grad if weights is None else grad * weights.double()).to(confidence.dtype)


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
        sine = -_sums(jumps, ends, len(k)).imag / (torch.pi * k).clamp(min=1)
        sine[0] = (signs * ends.diff()).sum()
        terms = series * sine
        return float(terms.sum()), float(-(sigma * (torch.pi * k) ** 2 * terms).sum()), sine

    def series(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Coefficients of R's cosine series, and their k."""
        count = math.ceil(CUTOFF / sigma) + 1
        if len(self.moments) < count:
            moments = _sums(self.w * self.r, self.f, count).real
            # residuals that cancel leave rounding
            self.moments = moments.where(moments.abs() > CANCELLED * (self.w * self.r).abs().sum(), 0.0)
        moments = self.moments[:count]
        k = _multiples(moments)
        return _doubled(_damping(sigma, k) * moments), k


def _multiples(series: Tensor) -> Tensor:
    """The k of a series' terms."""
    return torch.arange(len(series), dtype=series.dtype, device=series.device)


def _damping(sigma: float, k: Tensor) -> Tensor:
    return (-0.5 * (sigma * torch.pi * k) ** 2).exp()


def _doubled(series: Tensor) -> Tensor:
    """Of a cosine series, every term but the first counts twice."""
    return torch.cat([series[:1], 2 * series[1:]])


def _with_derivatives(series: Tensor, order: int) -> Tensor:
    """The function Re Σ_k series_k e^{iπkt} and its derivatives by t as such sums, (order + 1, K)."""
    k = _multiples(series)
    return torch.stack([series * (1j * torch.pi * k) ** n for n in range(order + 1)])


def _waves(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """e^{iπkt} for k < count as products: (n, A) for the multiples a·B, (n, B) for the rest of k = a·B + b."""
    width = math.isqrt(count - 1) + 1
    k = torch.arange(width, dtype=places.dtype, device=places.device)
    angles = torch.pi * places[:, None] * k
    coarse = width * angles[:, : -(-count // width)]
    return torch.complex(coarse.cos(), coarse.sin()), torch.complex(angles.cos(), angles.sin())


def _sums(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Σ_i values_i e^{iπk places_i} for every k < count."""
    total = None
    step = max(1, CHUNK // (2 * math.isqrt(count) + 2))
    for v, t in zip(values.split(step), places.split(step)):
        coarse, fine = _waves(t, count)
        part = (v[:, None] * coarse).T @ fine
        total = part if total is None else total + part
    assert total is not None
    return total.flatten()[:count]


def _evaluate(sums: Tensor, places: Tensor) -> Tensor:
    """Re Σ_k sums_mk e^{iπk places_i}, (m, n) for sums (m, K)."""
    count = sums.shape[1]
    parts = []
    for t in places.split(max(1, CHUNK // (2 * math.isqrt(count) + 2))):
        coarse, fine = _waves(t, count)
        size = (coarse.shape[1], fine.shape[1])
        padded = torch.nn.functional.pad(sums, (0, size[0] * size[1] - count)).view(-1, *size)
        parts.append((coarse * (fine @ padded.mT)).sum(-1).real)
    return torch.cat(parts, 1)


def _sign_changes(series: Tensor, sigma: float) -> tuple[Tensor, float]:
    """Where the cosine series changes sign within (0, 1), and its sign before the first place (0: it is 0)."""
    intervals = max(POINTS, math.ceil(POINTS / sigma))
    grid = torch.linspace(0, 1, intervals + 1, dtype=series.dtype, device=series.device)
    sums = _with_derivatives(series, 2)
    r, slope, _ = torch.fft.ifft(sums, 2 * intervals, norm="forward")[:, : intervals + 1].real
    least = ROUNDING * r.abs().max()
    # an extreme may be beyond 0 where its neighbours are not
    dips = (r[1:] * r[:-1] > least**2) & (r[:-1] * slope[:-1] < 0) & (r[1:] * slope[1:] > 0)
    extremes = _crossings(sums[1:], grid[:-1][dips], grid[1:][dips], slope[:-1][dips], slope[1:][dips])
    places, order = torch.cat([grid, extremes]).sort()
    r = torch.cat([r, _evaluate(sums[:1], extremes)[0]])[order]
    seen = r.abs() > least
    places, r = places[seen], r[seen]
    if not len(r):
        return places, 0.0
    change = r[1:].sign() != r[:-1].sign()
    roots = _crossings(sums[:2], places[:-1][change], places[1:][change], r[:-1][change], r[1:][change])
    return roots, float(r[0].sign())


def _crossings(sums: Tensor, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor) -> Tensor:
    """Where a function, with its derivative (2, K), is 0 between places at which it has these values of two signs."""
    place = low - at_low * (high - low) / (at_high - at_low)
    for _ in range(60 if len(place) else 0):
        value, slope = _evaluate(sums, place)
        before = value.sign() == at_low.sign()
        low, high = place.where(before, low), place.where(~before, high)
        # Newton's method, or halves where it leads out
        newton = place - value / slope
        inside = (newton > low - CLOSE) & (newton < high + CLOSE)
        last, place = place, newton.where(inside, (low + high) / 2)
        if float((place - last).abs().max()) < CLOSE:
            break
    return place.clamp(0, 1)
