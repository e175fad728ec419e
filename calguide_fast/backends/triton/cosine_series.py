"""Sums of cosine waves at many places, in float64: what the smooth ECE is made of.

Clenshaw's recurrence runs over every LANES-th term, side by side for LANES of them: as many independent chains keep a
thread busy, a chain has few steps to gather rounding in, and all of them are in one thread.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

PI = tl.constexpr(math.pi)
# terms side by side, and of a series a multiple of TERMS, as the recurrence takes two steps in one
LANES = tl.constexpr(8)
TERMS = tl.constexpr(2 * LANES.value)


@triton.jit
def wave(u):
    """cos(pi u) and sin(pi u) of any moderate u, 2 ulp, by the series that `csrc/smooth_ece_math.h` has."""
    # less the nearest even number, exactly
    rest = u - 2.0 * tl.floor(0.5 * u + 0.5)
    size = tl.abs(rest)
    # both are sines of an angle within pi / 2
    x, y = (0.5 - size) * PI, tl.minimum(size, 1.0 - size) * PI
    x2, y2 = x * x, y * y
    c, s = 1.0 - x2 * (1.0 / 420.0), 1.0 - y2 * (1.0 / 420.0)
    for n in tl.static_range(9, 0, -1):
        c = 1.0 - x2 * (1.0 / (2 * n * (2 * n + 1))) * c
        s = 1.0 - y2 * (1.0 / (2 * n * (2 * n + 1))) * s
    return x * c, tl.where(rest < 0.0, -y, y) * s


@triton.jit
def cosine_sums(series, first, terms, place, SLOPE: tl.constexpr, LANES: tl.constexpr):
    """Sums over k = first .. first + terms - 1 of series[k - first] cos(pi k place), and with SLOPE their derivatives.

    Both are [PLACES], as the places are; without SLOPE the second is 0. The terms are a multiple of 2 LANES.
    """
    lane = tl.arange(0, LANES)[:, None]
    t = place[None, :]
    step_cos, step_sin = wave(t * LANES)
    twice_cos = 2.0 * step_cos
    # [LANES, PLACES]: what the recurrence has at a term and at the one before, for the series and for k times it
    b1 = tl.zeros([LANES, place.shape[0]], tl.float64)
    b2, d1, d2 = b1, b1, b1
    for step in range(0, terms // (2 * LANES)):
        k = terms - (step + 1) * (2 * LANES) + lane
        even, odd = tl.load(series + k), tl.load(series + k + LANES)
        b2 = twice_cos * b1 + (odd - b2)
        b1 = twice_cos * b2 + (even - b1)
        if SLOPE:
            d2 = twice_cos * d1 + ((first + k + LANES).to(tl.float64) * odd - d2)
            d1 = twice_cos * d2 + ((first + k).to(tl.float64) * even - d1)
    # a lane's terms were taken as waves of LANES t, which begin at the lane's own wave
    start_cos, start_sin = wave((first + lane).to(tl.float64) * t)
    value = tl.sum(start_cos * (b1 - step_cos * b2) - start_sin * (step_sin * b2), 0)
    slope = tl.zeros_like(value)
    if SLOPE:
        slope = tl.sum(start_sin * (d1 - step_cos * d2) + start_cos * (step_sin * d2), 0) * -PI
    return value, slope
