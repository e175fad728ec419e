"""Sums of cosine waves at many places, in float64: what the smooth ECE is made of.

Clenshaw's recurrence runs over every LANES-th term, side by side for LANES of them: as many independent chains keep a
thread busy, a chain has few steps to gather rounding in, and all of them are in one thread.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

PI = tl.constexpr(math.pi)
# terms side by side; a series has a multiple of TERMS terms, as the recurrence takes two steps in one
LANES = tl.constexpr(16)
TERMS = tl.constexpr(2 * LANES.value)


@triton.jit
def _sin_pi_small(u):
    """sin(pi u) for |u| <= 1/2, 2 ulp: the series that `csrc/smooth_ece_math.h` has."""
    x = u * PI
    square = x * x
    r = 1.0 - square * (1.0 / 420.0)
    for n in tl.static_range(9, 0, -1):
        r = 1.0 - square * (1.0 / (2 * n * (2 * n + 1))) * r
    return x * r


@triton.jit
def _remainder(u):
    """u less the nearest even number, exactly."""
    return u - 2.0 * tl.floor(0.5 * u + 0.5)


@triton.jit
def cos_pi(u):
    """cos(pi u) of any moderate u, whose own rounding is the only one that grows with it."""
    return _sin_pi_small(0.5 - tl.abs(_remainder(u)))


@triton.jit
def sin_pi(u):
    """sin(pi u), as cos_pi."""
    rest = _remainder(u)
    size = tl.abs(rest)
    s = _sin_pi_small(tl.minimum(size, 1.0 - size))
    return tl.where(rest < 0.0, -s, s)


@triton.jit
def cosine_sums(series, first, terms, place, SLOPE: tl.constexpr):
    """Sums over k = first .. first + terms - 1 of series[k - first] cos(pi k place), and with SLOPE their derivatives.

    Both are [PLACES], as the places are; without SLOPE the second is 0. `first` is a multiple of LANES.
    """
    lane = tl.arange(0, LANES)[:, None]
    t = place[None, :]
    step_cos = cos_pi(t * LANES)
    twice_cos = 2.0 * step_cos
    # [LANES, PLACES]: what the recurrence has at a term and at the one before, for the series and for k times it
    b1 = tl.zeros([LANES, place.shape[0]], tl.float64)
    b2, d1, d2 = b1, b1, b1
    for step in range(0, terms // TERMS):
        k = terms - (step + 1) * TERMS + lane
        even, odd = tl.load(series + k), tl.load(series + k + LANES)
        b2 = twice_cos * b1 + (odd - b2)
        b1 = twice_cos * b2 + (even - b1)
        if SLOPE:
            d2 = twice_cos * d1 + ((first + k + LANES).to(tl.float64) * odd - d2)
            d1 = twice_cos * d2 + ((first + k).to(tl.float64) * even - d1)
    # a lane's terms were taken as waves of LANES t, which begin at the lane's own wave
    step_sin = sin_pi(t * LANES)
    start = (first + lane).to(tl.float64) * t
    start_cos, start_sin = cos_pi(start), sin_pi(start)
    value = tl.sum(start_cos * (b1 - step_cos * b2) - start_sin * (step_sin * b2), 0)
    slope = tl.zeros_like(value)
    if SLOPE:
        slope = tl.sum(start_sin * (d1 - step_cos * d2) + start_cos * (step_sin * d2), 0) * -PI
    return value, slope
