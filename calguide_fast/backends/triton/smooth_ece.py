"""smooth_ece in a fixed sequence of launches, none of which waits for the host: samples, moments, search.

The method is that of `csrc/cpu/kernels/smooth_ece.cpp` with bins for any number of samples, which share their residuals
out to nodes by cubic interpolation. The shares are summed as integers, of which 2^61 stand for about the total weight:
the sums, and so the bits of the result, are the same in whatever order the programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.smooth_ece import CURVE_LENGTH
from calguide_fast.backends.triton.cosine_series import LANES, cosine_sums
from calguide_fast.backends.triton.launch import as_double, device_of, doubles
from calguide_fast.backends.triton.smooth_ece_search import (
    MOST_TERMS,
    SEARCH_SCRATCH,
    all_allowed,
    least_bandwidth,
    search_kernel,
    terms_of,
)

# 16 bins per sigma at the least bandwidth: cubic interpolation is then right to 1e-9
BINS = tl.constexpr(16384)
# Each program has the moments of one part of the nodes, few enough that recurrences over them stay exact; the nodes
# 0 .. BINS are filled up to whole parts.
PART = tl.constexpr(2048)
PARTS = tl.constexpr(BINS.value // PART.value + 1)
NODES = tl.constexpr(PARTS.value * PART.value)
# tables of nodes, among which programs are spread: a saturated classifier has most samples in one bin
TABLES = tl.constexpr(8)

# programs that sum the weights
TOTALS = tl.constexpr(128)
# Places at which a program looks at a cosine series at a time, and nodes that it takes side by side. Tests raise them:
# the interpreter takes about as long for a large tile as for a small one.
PLACES = 256
NODE_LANES = LANES.value
# Samples at a time in a pass over them, and where they are shared out: there it is one a thread, or else what a thread
# loads and what it adds to memory would not be of the same samples, and pass through shared memory.
SAMPLES = 512
SHARED_OUT = 128
# programs that share out the samples, at least this many tiles each
_PROGRAMS, _TILES = 2112, 8

FUSED = {"enable_fp_fusion": True}

# offsets into scratch memory, in float64 numbers: the total weight, the moments' unit, R's mean; then whole arrays
_NUMBERS = 0
_TOTALS = 16
_NODES = _TOTALS + TOTALS.value
_MOMENTS = _NODES + NODES.value
_SEARCH = _MOMENTS + PARTS.value * MOST_TERMS.value
_SCRATCH = _SEARCH + SEARCH_SCRATCH


@triton.jit(do_not_specialize=["count", "tiles"])
def _weigh_kernel(weights, totals, count: tl.int64, tiles: tl.int64, SAMPLES: tl.constexpr):
    """Partial sums of the weights, NaN for one that is not allowed."""
    total = tl.zeros([SAMPLES], tl.float64)
    for tile in range(0, tiles):
        i = (tl.program_id(0) * tiles + tile) * SAMPLES + tl.arange(0, SAMPLES)
        w = tl.load(weights + i, mask=i < count, other=0.0).to(tl.float64)
        total += tl.where(w >= 0.0, w, float("nan"))
    tl.store(totals + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _total_and_scale(totals, count, programs):
    """The total weight, and the power of two that brings it to 2^61 .. 2^62."""
    if totals is not None:
        part = tl.arange(0, TOTALS)
        total = tl.sum(tl.load(totals + part, mask=part < programs, other=0.0), 0)
    else:
        total = count.to(tl.float64)
    exponent = (total.to(tl.int64, bitcast=True) >> 52) & 2047
    scale = tl.minimum(tl.maximum(61 + 2 * 1023 - exponent, 1), 2046) << 52
    return total, scale.to(tl.float64, bitcast=True)


@triton.jit
def _shares(amount, d, node):
    """The four nodes' shares of an amount at offset d from its bin's centre, by cubic interpolation, as integers.

    Their coefficients of d^0 .. d^3 are `share_coefficients` of `csrc/smooth_ece_math.h`.
    """
    outer, side = ((node == 0) | (node == 3)).to(tl.float64), (1 - node // 2 * 2).to(tl.float64)
    c0, c1 = 9.0 / 16.0 - 5.0 / 8.0 * outer, (7.0 / 6.0 * outer - 9.0 / 8.0) * side
    c2, c3 = 1.0 / 2.0 * outer - 1.0 / 4.0, (1.0 / 2.0 - 2.0 / 3.0 * outer) * side
    return (amount * (((c3 * d + c2) * d + c1) * d + c0)).to(tl.int64)


@triton.jit
def _flush(table, bins, node, shares, mask):
    """Adds the shares to the nodes about their bins."""
    # cosines are even about 0 and 1, and so a node beyond is the one before
    beyond = tl.abs(tl.abs(bins + node - 1) - BINS)
    tl.atomic_add(table + BINS - beyond, shares, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["count", "tiles", "weighers"])
def _deposit_kernel(
    confidence, correct, weights, totals, numbers, sums, count: tl.int64, tiles: tl.int64, weighers: tl.int64,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Adds the samples' residuals to `sums`: whether one is spoilt, the residuals' sum, and TABLES of nodes."""
    total, scale = _total_and_scale(totals, count, weighers)
    if tl.program_id(0) == 0:
        tl.store(numbers, total)
        tl.store(numbers + 1, 1.0 / (scale * total))
    table = sums + 2 + (tl.program_id(0) % TABLES) * NODES
    node = tl.arange(0, 4)[:, None]
    # each lane keeps the four sums of a bin as long as its samples stay there
    bins = tl.full([1, SAMPLES], -1, tl.int32)
    shares = tl.zeros([4, SAMPLES], tl.int64)
    mean = tl.zeros([1, SAMPLES], tl.int64)
    spoilt = tl.zeros([1, SAMPLES], tl.int32)
    for tile in range(0, tiles):
        i = (tl.program_id(0) * tiles + tile) * SAMPLES + tl.arange(0, SAMPLES)[None, :]
        f = tl.load(confidence + i, mask=i < count, other=0.0).to(tl.float64)
        amount = f - (tl.load(correct + i, mask=i < count, other=0) != 0).to(tl.float64)
        if weights is not None:
            amount *= tl.load(weights + i, mask=i < count, other=0.0).to(tl.float64)
        allowed = (f >= 0.0) & (f <= 1.0)
        spoilt |= (~allowed).to(tl.int32)
        amount = tl.where(allowed, amount * scale, 0.0)
        position = tl.where(allowed, f, 0.0) * BINS
        here = tl.minimum(position.to(tl.int32), BINS - 1)
        moved = (here != bins) & (i < count)
        _flush(table, bins, node, shares, moved & (bins >= 0))
        bins = tl.where(moved, here, bins)
        shares = tl.where(moved, 0, shares) + _shares(amount, position - here.to(tl.float64) - 0.5, node)
        mean += amount.to(tl.int64)
    _flush(table, bins, node, shares, bins >= 0)
    tl.atomic_add(sums + 1, tl.sum(tl.sum(mean, 1), 0), sem="relaxed")
    if tl.max(tl.max(spoilt, 1), 0) > 0:
        # which is 1 whichever program stores it
        tl.store(sums, 1)


@triton.jit(do_not_specialize=["bandwidth"])
def _moments_kernel(sums, numbers, nodes, moments, bandwidth: tl.int64, PLACES: tl.constexpr, LANES: tl.constexpr):
    """Cosine moments of one part of the nodes, as far as the search may need them: [PARTS, MOST_TERMS]."""
    mean = tl.load(sums + 1).to(tl.float64) * tl.load(numbers + 1)
    terms = terms_of(least_bandwidth(as_double(bandwidth), mean))
    k = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    if (tl.program_id(1) * PLACES < terms) & all_allowed(sums, numbers):
        first = tl.program_id(0) * PART
        node = first + tl.arange(0, PART)
        residual = tl.zeros([PART], tl.int64)
        for table in tl.static_range(TABLES):
            residual += tl.load(sums + 2 + table * NODES + node)
        # the programs of a part store and read the same
        tl.store(nodes + node, residual.to(tl.float64) * tl.load(numbers + 1))
        tl.debug_barrier()
        # a sum over nodes at places j / BINS is one over terms j at the place k / BINS
        moment, _ = cosine_sums(nodes + first, first, PART, k.to(tl.float64) * (1.0 / BINS), False, LANES)
        tl.store(moments + tl.program_id(0) * MOST_TERMS + k, moment, mask=k < terms)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(numbers + 2, mean)


def smooth_ece(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and bandwidth in the confidences' dtype, and what the gradient needs (CURVE_LENGTH,) or (0,).

    Bandwidth 0: the fixpoint.
    """
    count = len(confidence)
    confidence, correct = confidence.contiguous(), correct.contiguous().view(torch.uint8)
    value, found = confidence.new_empty(()), confidence.new_empty(())
    curve = confidence.new_empty(CURVE_LENGTH if with_curve else 0, dtype=torch.float64)
    sums = torch.zeros(2 + TABLES.value * NODES.value, dtype=torch.int64, device=confidence.device)
    scratch = torch.empty(_SCRATCH, dtype=torch.float64, device=confidence.device)
    numbers, nodes, moments = scratch[_NUMBERS:], scratch[_NODES:], scratch[_MOMENTS:]
    search, totals = scratch[_SEARCH:], None
    tiles, deposits, weighers = triton.cdiv(count, SAMPLES), triton.cdiv(count, SHARED_OUT), 0
    each = min(deposits, max(_TILES, triton.cdiv(deposits, _PROGRAMS)))
    (sigma,) = doubles(bandwidth)
    many = {"num_warps": 8, **FUSED}
    with device_of(confidence):
        if weights is not None:
            weights, totals = weights.contiguous(), scratch[_TOTALS:]
            weighed = triton.cdiv(tiles, TOTALS.value)
            weighers = triton.cdiv(tiles, weighed)
            _weigh_kernel[(weighers,)](weights, totals, count, weighed, SAMPLES=SAMPLES, **FUSED)
        _deposit_kernel[(triton.cdiv(deposits, each),)](
            confidence, correct, weights, totals, numbers, sums, count, each, weighers, SAMPLES=SHARED_OUT, **FUSED
        )
        grid = (PARTS.value, triton.cdiv(MOST_TERMS.value, PLACES))
        _moments_kernel[grid](sums, numbers, nodes, moments, sigma, PLACES=PLACES, LANES=NODE_LANES, **many)
        search_kernel[(1,)](
            sums, numbers, moments, search, value, found, curve if with_curve else None, sigma,
            PARTS=PARTS.value, PLACES=PLACES, **many,
        )  # fmt: skip
    return value, found, curve
