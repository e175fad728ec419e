"""The smooth ECE's bandwidth search, all in one program: from the residuals' cosine moments to the fixpoint.

The method is that of `csrc/cpu/kernels/smooth_ece.cpp`, the formulas those of `backends/smooth_ece.py`. What a step
leaves for the next lies in scratch memory, with a barrier between: only the list of the places where R changes sign
has a length that depends on the samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calguide_fast.backends import outcomes
from calguide_fast.backends.smooth_ece import CURVE_LENGTH, LEAST_BANDWIDTH
from calguide_fast.backends.triton.cosine_series import LANES, PI, TERMS, cosine_sums, wave
from calguide_fast.backends.triton.launch import as_double

FLOOR = tl.constexpr(LEAST_BANDWIDTH)
LEAST_TOTAL, MOST_TOTAL = tl.constexpr(outcomes.LEAST_TOTAL), tl.constexpr(outcomes.MOST_TOTAL)
# the cosine series ends at k = CUTOFF / sigma; R is looked at on POINTS places per sigma; as `csrc/smooth_ece_math.h`
CUTOFF = tl.constexpr(2.5)
POINTS = tl.constexpr(8)
ROUNDING = tl.constexpr(1e-12)
# where the search begins
FIRST_BANDWIDTH = tl.constexpr(0.1)
# where it ends, and how low a step goes
CLOSE = tl.constexpr(1e-12)
EVALUATIONS = tl.constexpr(100)
STEP_SHARE = tl.constexpr(0.25)

# the longest series, and the largest numbers of intervals and of places with a value of R: a grid's and its dips'
MOST_TERMS = tl.constexpr(triton.cdiv(int(CUTOFF.value / LEAST_BANDWIDTH) + 2, TERMS.value) * TERMS.value)
MOST_INTERVALS = int(POINTS.value / LEAST_BANDWIDTH)
_MOST_SAMPLES = 2 * MOST_INTERVALS + 2

# terms of S's series that a curve has room for, after the bandwidth and the gradient's factor
CURVE_TERMS = tl.constexpr(CURVE_LENGTH - 2)

# offsets into the search's scratch memory, in float64 numbers
_MOMENTS = tl.constexpr(0)
_SERIES = tl.constexpr(_MOMENTS.value + MOST_TERMS.value)
_SINE = tl.constexpr(_SERIES.value + MOST_TERMS.value)
_GRID = tl.constexpr(_SINE.value + MOST_TERMS.value)
_SAMPLE_PLACE = tl.constexpr(_GRID.value + MOST_INTERVALS + 2)
_SAMPLE_VALUE = tl.constexpr(_SAMPLE_PLACE.value + _MOST_SAMPLES)
_LOW = tl.constexpr(_SAMPLE_VALUE.value + _MOST_SAMPLES)
_HIGH = tl.constexpr(_LOW.value + _MOST_SAMPLES)
_START = tl.constexpr(_HIGH.value + _MOST_SAMPLES)
_RISE = tl.constexpr(_START.value + _MOST_SAMPLES)
_ROOT = tl.constexpr(_RISE.value + _MOST_SAMPLES)
SEARCH_SCRATCH = _ROOT.value + _MOST_SAMPLES


@triton.jit
def intervals_of(sigma, per_sigma):
    """How many intervals of [0, 1] give so many per sigma."""
    return tl.ceil(1.0 / tl.minimum(sigma, 1.0) * per_sigma).to(tl.int32)


@triton.jit
def terms_of(sigma):
    """The length of the cosine series."""
    terms = (1.0 / sigma * CUTOFF).to(tl.int32) + 2
    return tl.minimum((terms + TERMS - 1) // TERMS * TERMS, MOST_TERMS)


@triton.jit
def least_bandwidth(bandwidth, mean):
    """The least sigma that is needed: the one given, or as the integral is at least the size of R's mean, that."""
    # with room for rounding
    least = tl.maximum(tl.full([], FLOOR, tl.float64), 0.999 * tl.abs(mean))
    return tl.where(bandwidth > 0.0, bandwidth, least)


@triton.jit
def all_allowed(spoilt, numbers):
    """Whether no sample is spoilt and the weights have a total."""
    # a bare constant would be float32 next to another
    total, least, most = tl.load(numbers), tl.full([], LEAST_TOTAL, tl.float64), tl.full([], MOST_TOTAL, tl.float64)
    return (tl.load(spoilt) == 0) & (total >= least) & (total <= most)


@triton.jit
def _damping(sigma, k):
    """exp(-sigma^2 pi^2 k^2 / 2), twice for k > 0."""
    frequency = k.to(tl.float64) * sigma * PI
    return tl.where(k == 0, 1.0, 2.0) * tl.exp(-0.5 * frequency * frequency)


@triton.jit
def _damp(scratch, moments, sigma, terms, PLACES: tl.constexpr):
    for first in range(0, terms, PLACES):
        k = first + tl.arange(0, PLACES)
        c = tl.load(scratch + moments + k, mask=k < terms, other=0.0)
        tl.store(scratch + _SERIES + k, _damping(sigma, k) * c, mask=k < terms)
    tl.debug_barrier()


@triton.jit
def _look(scratch, sigma, terms, PLACES: tl.constexpr):
    """Leaves the places and values of R that are more than rounding, in order; their number.

    They are those of a grid, and where a parabola through three of it dips through 0 unseen, of its vertex.
    """
    series = scratch + _SERIES
    intervals = intervals_of(sigma, POINTS)
    width = 1.0 / intervals.to(tl.float64)
    largest = tl.full([], 0.0, tl.float64)
    for first in range(0, intervals + 1, PLACES):
        g = first + tl.arange(0, PLACES)
        value, _ = cosine_sums(series, 0, terms, g.to(tl.float64) * width, False, LANES)
        tl.store(scratch + _GRID + g, value, mask=g <= intervals)
        largest = tl.maximum(largest, tl.max(tl.where(g <= intervals, tl.abs(value), 0.0), 0))
    tl.debug_barrier()
    samples = 0
    for first in range(0, intervals + 1, PLACES):
        g = first + tl.arange(0, PLACES)
        inside = (g > 0) & (g < intervals)
        middle = tl.load(scratch + _GRID + g, mask=g <= intervals, other=0.0)
        left = tl.load(scratch + _GRID + g - 1, mask=inside, other=0.0)
        right = tl.load(scratch + _GRID + g + 1, mask=inside, other=0.0)
        slope, bend = 0.5 * (right - left), left - 2.0 * middle + right
        dips = (left * middle > 0.0) & (right * middle > 0.0) & (middle * bend > 0.0)
        dips &= (tl.abs(slope) <= 0.5 * tl.abs(bend)) & (2.0 * middle * bend <= slope * slope)
        shift = tl.where(dips, -slope / tl.where(dips, bend, 1.0), 0.0)
        vertex = (g.to(tl.float64) + shift) * width
        lowest = middle
        if tl.max(dips.to(tl.int32), 0) > 0:
            lowest, _ = cosine_sums(series, 0, terms, vertex, False, LANES)
        on_grid = (tl.abs(middle) > largest * ROUNDING).to(tl.int32)
        at_vertex = (dips & (tl.abs(lowest) > largest * ROUNDING)).to(tl.int32)
        both = on_grid + at_vertex
        before = samples + tl.cumsum(both, 0) - both
        index = before + tl.where(shift < 0.0, at_vertex, 0)
        tl.store(scratch + _SAMPLE_PLACE + index, g.to(tl.float64) * width, mask=on_grid > 0)
        tl.store(scratch + _SAMPLE_VALUE + index, middle, mask=on_grid > 0)
        index = before + tl.where(shift < 0.0, 0, on_grid)
        tl.store(scratch + _SAMPLE_PLACE + index, vertex, mask=at_vertex > 0)
        tl.store(scratch + _SAMPLE_VALUE + index, lowest, mask=at_vertex > 0)
        samples += tl.sum(both, 0)
    tl.debug_barrier()
    return samples


@triton.jit
def _bracket(scratch, samples, PLACES: tl.constexpr):
    """Leaves a bracket for every change of sign, in order, where to begin in it and by how much the sign rises."""
    roots = 0
    for first in range(1, samples, PLACES):
        s = first + tl.arange(0, PLACES)
        there = s < samples
        low = tl.load(scratch + _SAMPLE_PLACE + s - 1, mask=there, other=0.0)
        high = tl.load(scratch + _SAMPLE_PLACE + s, mask=there, other=0.0)
        before = tl.load(scratch + _SAMPLE_VALUE + s - 1, mask=there, other=1.0)
        after = tl.load(scratch + _SAMPLE_VALUE + s, mask=there, other=1.0)
        changes = (before > 0.0) != (after > 0.0)
        index = roots + tl.cumsum(changes.to(tl.int32), 0) - 1
        secant = low + (high - low) * (before / tl.where(changes, before - after, 1.0))
        tl.store(scratch + _LOW + index, low, mask=changes)
        tl.store(scratch + _HIGH + index, high, mask=changes)
        tl.store(scratch + _START + index, secant, mask=changes)
        tl.store(scratch + _RISE + index, tl.where(after > 0.0, 2.0, -2.0), mask=changes)
        roots += tl.sum(changes.to(tl.int32), 0)
    tl.debug_barrier()
    return roots


@triton.jit
def _polish(scratch, roots, terms, PLACES: tl.constexpr):
    """Newton's method within the brackets, which close by halves where it leads out of them; leaves the roots."""
    for first in range(0, roots, PLACES):
        j = first + tl.arange(0, PLACES)
        there = j < roots
        low = tl.load(scratch + _LOW + j, mask=there, other=0.0)
        high = tl.load(scratch + _HIGH + j, mask=there, other=1.0)
        place = tl.load(scratch + _START + j, mask=there, other=0.5)
        rise = tl.load(scratch + _RISE + j, mask=there, other=0.0)
        step = 0
        while step < 20:
            value, slope = cosine_sums(scratch + _SERIES, 0, terms, place, True, LANES)
            above = value * rise > 0.0
            high, low = tl.where(above, place, high), tl.where(above, low, place)
            newton = place - value / tl.where(slope == 0.0, 1.0, slope)
            inside = (newton >= low) & (newton <= high) & (slope != 0.0)
            following = tl.where(inside, newton, 0.5 * (low + high))
            farthest = tl.max(tl.where(there, tl.abs(following - place), 0.0), 0)
            place = following
            step = tl.where(farthest > 1e-11, step + 1, 20)
        tl.store(scratch + _ROOT + j, place, mask=there)
    tl.debug_barrier()


@triton.jit
def _integrate(scratch, sigma, terms, samples, roots, PLACES: tl.constexpr):
    """The integral of |R| and its derivative by sigma, from the places of the sign's changes; leaves sine moments."""
    last = tl.load(scratch + _SAMPLE_VALUE + samples - 1, mask=samples > 0, other=0.0)
    last_sign = tl.where(last > 0.0, 1.0, tl.where(last < 0.0, -1.0, 0.0))
    value = tl.full([], 0.0, tl.float64)
    slope = value
    for first in range(0, terms, PLACES):
        k = first + tl.arange(0, PLACES)
        frequency = k.to(tl.float64) * PI
        moment = tl.zeros([PLACES], tl.float64)
        for start in range(0, roots, LANES):
            j = start + tl.arange(0, LANES)[:, None]
            place = tl.load(scratch + _ROOT + j, mask=j < roots, other=0.0)
            rise = tl.load(scratch + _RISE + j, mask=j < roots, other=0.0)
            _, sine = wave(k.to(tl.float64)[None, :] * place)
            # over its frequency, a wave's limit at k = 0 is the place
            moment += tl.sum(rise * tl.where(k[None, :] == 0, place, sine), 0)
        sine = tl.where(k == 0, last_sign, 0.0) - moment / tl.where(k == 0, 1.0, frequency)
        term = sine * tl.load(scratch + _SERIES + k, mask=k < terms, other=0.0)
        value += tl.sum(term, 0)
        slope -= tl.sum(sigma * frequency * frequency * term, 0)
        tl.store(scratch + _SINE + k, sine, mask=k < terms)
    tl.debug_barrier()
    return value, slope


@triton.jit(do_not_specialize=["bandwidth"])
def search_kernel(
    spoilt, numbers, partial_moments, scratch, value_out, sigma_out, curve, bandwidth: tl.int64,
    PARTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Value and bandwidth, and to `curve`, if there is one, what the gradient needs."""
    bandwidth = as_double(bandwidth)
    allowed = all_allowed(spoilt, numbers)
    # a bare constant would be float32 next to another, or in a choice
    floor = tl.full([], FLOOR, tl.float64)
    # what is not allowed has no series to speak of
    low = tl.where(allowed, least_bandwidth(bandwidth, tl.load(numbers + 2)), 1.0)
    for first in range(0, terms_of(low), PLACES):
        k = first + tl.arange(0, PLACES)
        moment = tl.zeros([PLACES], tl.float64)
        for part in range(0, PARTS):
            moment += tl.load(partial_moments + part * MOST_TERMS + k, mask=k < terms_of(low), other=0.0)
        tl.store(scratch + _MOMENTS + k, moment, mask=k < terms_of(low))
    tl.debug_barrier()

    # the integral falls with sigma, so the fixpoint lies between any sigma and the integral there
    high = tl.full([], 1.0, tl.float64)
    sigma = tl.maximum(low, tl.where(bandwidth > 0.0, low, tl.full([], FIRST_BANDWIDTH, tl.float64)))
    value = tl.full([], 0.0, tl.float64)
    slope = value
    step = tl.where(allowed, 0, EVALUATIONS)
    while step < EVALUATIONS:
        terms = terms_of(sigma)
        _damp(scratch, _MOMENTS, sigma, terms, PLACES)
        samples = _look(scratch, sigma, terms, PLACES)
        roots = _bracket(scratch, samples, PLACES)
        _polish(scratch, roots, terms, PLACES)
        value, slope = _integrate(scratch, sigma, terms, samples, roots, PLACES)
        at_least = (sigma == floor) & (value < sigma)
        # residuals that cancel do so at any bandwidth
        found = (value == 0.0) | (tl.abs(value - sigma) < CLOSE) | at_least | (bandwidth > 0.0)
        step = tl.where(found, EVALUATIONS, step + 1)
        if step < EVALUATIONS:
            low = tl.maximum(low, tl.minimum(value, sigma))
            high = tl.minimum(high, tl.maximum(value, sigma))
            # small bandwidths are dear, and Newton's first step overshoots to them
            newton = tl.maximum(sigma + (value - sigma) / (1.0 - slope), STEP_SHARE * sigma)
            middle = 0.5 * (low + high)
            sigma = tl.where(newton < low, tl.where(low == floor, low, middle), tl.where(newton > high, middle, newton))

    cancelled = (value == 0.0) & (bandwidth == 0.0)
    nan = tl.where(allowed, 0.0, float("nan"))
    tl.store(value_out, (nan + value).to(value_out.dtype.element_ty))
    tl.store(sigma_out, (nan + tl.where(cancelled, floor, sigma)).to(sigma_out.dtype.element_ty))
    if curve is not None:
        terms = terms_of(sigma)
        _damp(scratch, _SINE, sigma, terms, PLACES)
        for first in range(0, CURVE_TERMS, PLACES):
            k = first + tl.arange(0, PLACES)
            term = tl.load(scratch + _SERIES + k, mask=k < terms, other=0.0)
            tl.store(curve + 2 + k, term, mask=k < CURVE_TERMS)
        at_fixpoint = (bandwidth == 0.0) & (sigma > floor) & ~cancelled
        tl.store(curve, nan + sigma)
        tl.store(curve + 1, nan + 1.0 / (tl.load(numbers) * tl.where(at_fixpoint, 1.0 - slope, 1.0)))
