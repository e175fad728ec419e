"""Logits to the confidence in the top class, and back, in tiles of (rows, classes).

A row of several tiles is summed relative to the largest logit so far. A NaN, which a maximum may drop, stays in the
sum of the exponentials.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.triton.launch import device_of, tile_shape

# a thread has 8 classes, for loads of 16 bytes; a longer row takes several tiles
NARROWEST = 1024
WIDEST = 4096


@triton.jit
def _tile(logits, row, column, batch, classes, row_stride, class_stride):
    """fp32 logits, [ROWS, BLOCK], -inf beyond the last."""
    mask = (row < batch)[:, None] & (column < classes)
    offset = row[:, None] * row_stride + column.to(tl.int64) * class_stride
    return tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _origin(top):
    """From which exponentials are measured: where all logits are masked, any number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["batch", "class_groups", "row_groups"])
def _label_kernel(
    logits, labels, confidence, top, correct, batch, class_groups, row_groups, class_stride, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # sizes as multiples of what they have in common, from which the compiler knows that it may read 16 bytes at a time
    classes, row_stride = class_groups * GROUP, row_groups.to(tl.int64) * GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < batch
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    place = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float64)
    end = classes
    if FITS:
        end = BLOCK
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        f = _tile(logits, row, column, batch, classes, row_stride, class_stride)
        known = tl.where(f == f, f, float("-inf"))
        highest = tl.max(known, 1)
        # the first of equal ones
        first = tl.min(tl.where(known == highest[:, None], column, 0x7FFFFFFF), 1)
        place = tl.where(highest > largest, first, place)
        highest = tl.maximum(highest, largest)
        total *= tl.exp(largest - _origin(highest)).to(tl.float64)
        total += tl.sum(tl.exp(f - _origin(highest)[:, None]), 1).to(tl.float64)
        largest = highest

    label = tl.load(labels + row * label_stride, mask=there, other=-1)
    # not the total of a row with NaN or an infinite largest logit, which is NaN, nor that of a masked one, which is 0
    valid = (total > 0.0) & (label >= 0) & (label < classes)
    p = tl.where(valid, 1.0 / tl.where(valid, total, 1.0), float("nan"))
    tl.store(confidence + row, p.to(tl.float32), mask=there)
    tl.store(top + row, place.to(tl.int64), mask=there)
    tl.store(correct + row, (valid & (place == label)).to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["batch", "class_groups", "row_groups"])
def _pull_kernel(
    grad_confidence, logits, confidence, top, grad, batch, class_groups, row_groups, class_stride, grad_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    classes, row_stride = class_groups * GROUP, row_groups.to(tl.int64) * GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < batch
    p = tl.load(confidence + row, mask=there, other=0.0)
    scale = p * tl.load(grad_confidence + row * grad_stride, mask=there, other=0.0)
    place = tl.load(top + row, mask=there, other=0)
    largest = tl.load(logits + row * row_stride + place * class_stride, mask=there, other=0.0).to(tl.float32)
    f = _tile(logits, row, column, batch, classes, row_stride, class_stride)
    # g confidence (1[i = top] - p_i), with p_i = exp(f_i - f_top) confidence
    share = tl.exp(f - largest[:, None]) * p[:, None]
    g = scale[:, None] * (tl.where(column == place[:, None], 1.0, 0.0) - share)
    mask = there[:, None] & (column < classes)
    tl.store(grad + row[:, None] * classes + column, g.to(grad.dtype.element_ty), mask=mask)


def top_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest probability (n,) fp32, its class (n,) int64, whether that is the label; NaN for one out of range."""
    batch, classes = logits.shape
    confidence = torch.empty(batch, dtype=torch.float32, device=logits.device)
    top = torch.empty(batch, dtype=torch.int64, device=logits.device)
    correct = torch.empty(batch, dtype=torch.bool, device=logits.device)
    if batch:
        rows, block = tile_shape(classes, NARROWEST, WIDEST)
        with device_of(logits):
            _label_kernel[(triton.cdiv(batch, rows),)](
                logits, labels, confidence, top, correct.view(torch.uint8), batch, *_strides(logits),
                labels.stride(0), ROWS=rows, BLOCK=block, FITS=block >= classes, GROUP=_group(logits),
                num_warps=min(max(4, rows * block // 512), 8), enable_fp_fusion=True,
            )  # fmt: skip
    return confidence, top, correct


def top_label_backward(grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
    """The confidences' gradient in the logits, (n, C) in their dtype."""
    batch, classes = logits.shape
    grad = torch.empty((batch, classes), dtype=logits.dtype, device=logits.device)
    if batch:
        rows, block = tile_shape(classes, NARROWEST, WIDEST)
        with device_of(logits):
            _pull_kernel[(triton.cdiv(batch, rows), triton.cdiv(classes, block))](
                grad_confidence, logits, confidence.contiguous(), top.contiguous(), grad, batch, *_strides(logits),
                grad_confidence.stride(0), ROWS=rows, BLOCK=block, GROUP=_group(logits),
                num_warps=min(max(4, rows * block // 512), 8), enable_fp_fusion=True,
            )  # fmt: skip
    return grad


def _group(logits: Tensor) -> int:
    return math.gcd(logits.shape[1], logits.stride(0), 16)


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """Classes and row stride in groups, and the class stride."""
    group = _group(logits)
    return logits.shape[1] // group, logits.stride(0) // group, logits.stride(1)
