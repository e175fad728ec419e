"""Weights of the images of a tilt group: a softmax over the batch in float64, in one fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.triton.launch import as_double, device_of, doubles

# scores that are summed side by side
LANES = tl.constexpr(128)


@triton.jit
def softmax_sums(scores, stride, batch, tilt):
    """The largest exponent tilt * score, and the sum of exponentials relative to it: NaN where there is no softmax."""
    lane = tl.arange(0, LANES)
    largest = tl.full([LANES], float("-inf"), tl.float64)
    for start in range(0, batch, LANES):
        exponent = tilt * tl.load(scores + (start + lane).to(tl.int64) * stride, mask=start + lane < batch, other=0.0)
        largest = tl.maximum(largest, tl.where(start + lane < batch, exponent, float("-inf")))
    # a maximum drops NaN, which comes back with the sum
    top = tl.max(largest, 0)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, batch, LANES):
        exponent = tilt * tl.load(scores + (start + lane).to(tl.int64) * stride, mask=start + lane < batch, other=0.0)
        total += tl.where(start + lane < batch, tl.exp(exponent - top), 0.0)
    return top, tl.sum(total, 0)


@triton.jit
def tilt_weight(score, tilt, top, total, unit, max_weight):
    """unit * softmax(tilt * score), clipped; NaN stays."""
    weight = unit * (tl.exp(tilt * score - top) / total)
    return tl.where(weight > max_weight, max_weight, weight).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "tilt", "max_weight"])
def _tilt_kernel(scores, weights, stride, batch, tilt: tl.int64, max_weight: tl.int64, MEAN: tl.constexpr):
    tilt = as_double(tilt)
    top, total = softmax_sums(scores, stride, batch, tilt)
    unit = 1.0
    if MEAN:
        unit = batch.to(tl.float64)
    for start in range(0, batch, LANES):
        b = start + tl.arange(0, LANES)
        score = tl.load(scores + b.to(tl.int64) * stride, mask=b < batch, other=0.0)
        tl.store(weights + b, tilt_weight(score, tilt, top, total, unit, as_double(max_weight)), mask=b < batch)


def tilt_weights(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    """Weights of the images of one tilt group, (B,) fp32."""
    scores = scores.float()
    count = scores.shape[0]
    weights = torch.empty(count, dtype=torch.float32, device=scores.device)
    if count:
        with device_of(scores):
            _tilt_kernel[(1,)](
                scores, weights, scores.stride(0), count, *doubles(tilt, max_weight), MEAN=not normalize_sum
            )
    return weights
