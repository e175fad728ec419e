"""The gradient of smooth_ece in two launches: S = K * sign R at the ends of cells, and cubics between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.smooth_ece import LEAST_BANDWIDTH
from calguide_fast.backends.triton.cosine_series import LANES, cosine_sums
from calguide_fast.backends.triton.launch import device_of
from calguide_fast.backends.triton.smooth_ece_search import intervals_of, terms_of

# cells per sigma
CELLS = tl.constexpr(24)
_MOST_CELLS = int(CELLS.value / LEAST_BANDWIDTH)

# ends of cells, and samples, that a program takes at a time; tests raise them
PLACES = 256
SAMPLES = 512

_FUSED = {"enable_fp_fusion": True}


@triton.jit
def _bandwidth(curve):
    """Of S; where nothing was measured any, as the factor is NaN."""
    sigma = tl.load(curve)
    return tl.where(sigma > 0.0, sigma, 1.0)


@triton.jit
def _curve_kernel(curve, nodes, PLACES: tl.constexpr):
    """S and its slope, per cell, at the ends of the cells: (S, slope) for each."""
    sigma = _bandwidth(curve)
    cells = intervals_of(sigma, CELLS)
    g = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    if tl.program_id(0) * PLACES <= cells:
        width = 1.0 / cells.to(tl.float64)
        value, slope = cosine_sums(curve + 2, 0, terms_of(sigma), g.to(tl.float64) * width, True, LANES)
        tl.store(nodes + 2 * g, value, mask=g <= cells)
        tl.store(nodes + 2 * g + 1, slope * width, mask=g <= cells)


@triton.jit
def _widened(x):
    """In float64; what has 16 bits by way of float32."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit(do_not_specialize=["count"])
def _gradient_kernel(
    confidence, correct, weights, curve, nodes, value_grad, grad, count: tl.int64, SAMPLES: tl.constexpr
):
    """grad_i = factor w_i (S(f_i) + r_i S'(f_i)), S by Hermite's cubic in a cell."""
    cells = intervals_of(_bandwidth(curve), CELLS)
    factor = tl.load(curve + 1) * tl.load(value_grad).to(tl.float64)
    i = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    f = _widened(tl.load(confidence + i, mask=i < count, other=0.0))
    residual = f - (tl.load(correct + i, mask=i < count, other=0) != 0).to(tl.float64)
    # where f is not allowed the factor is NaN
    position = tl.where((f >= 0.0) & (f <= 1.0), f, 0.0) * cells.to(tl.float64)
    cell = tl.minimum(position.to(tl.int32), cells - 1)
    d = position - cell.to(tl.float64)
    left, left_slope = tl.load(nodes + 2 * cell), tl.load(nodes + 2 * cell + 1)
    rise, right_slope = tl.load(nodes + 2 * cell + 2) - left, tl.load(nodes + 2 * cell + 3)
    square, cube = 3.0 * rise - 2.0 * left_slope - right_slope, left_slope + right_slope - 2.0 * rise
    value = ((cube * d + square) * d + left_slope) * d + left
    slope = ((3.0 * cube * d + 2.0 * square) * d + left_slope) * cells.to(tl.float64)
    g = factor * (value + residual * slope)
    if weights is not None:
        g *= tl.load(weights + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(grad + i, _narrowed(g, grad.dtype.element_ty), mask=i < count)


def smooth_ece_gradient(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor
) -> Tensor:
    """The gradient of the value that `curve` was left for times `value_grad`, (n,) in the confidences' dtype."""
    count = len(confidence)
    confidence, correct = confidence.contiguous(), correct.contiguous().view(torch.uint8)
    weights = None if weights is None else weights.contiguous()
    curve, grad = curve.contiguous(), torch.empty_like(confidence)
    nodes = curve.new_empty(2 * (_MOST_CELLS + 1))
    with device_of(confidence):
        # as many cells as there can be: the programs beyond those that there are end at once
        grid = (triton.cdiv(_MOST_CELLS + 1, PLACES),)
        _curve_kernel[grid](curve, nodes, PLACES=PLACES, num_warps=8, **_FUSED)
        _gradient_kernel[(triton.cdiv(count, SAMPLES),)](
            confidence, correct, weights, curve, nodes, value_grad, grad, count, SAMPLES=SAMPLES, **_FUSED
        )
    return grad
