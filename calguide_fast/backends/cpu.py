"""CPU backend: vectorised C++ kernels, called with raw pointers, sizes and strides.

Arguments arrive checked; see `calguide_fast.ops` for what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch first: the kernels then share its OpenMP runtime
from calguide_fast import _cpu

# codes of csrc/storage.h
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def guidance_gradient(
    logits: Tensor,
    labels: Tensor,
    divergence: int,
    order: float,
    alpha: float,
    epsilon: float,
    joint_temperature: float,
    marginal_temperature: float,
    entropy_weight: float,
    adaptive_entropy: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient (B, C) in the logits' dtype and statistics (5, B) fp32; a label out of range is a ValueError."""
    batch, classes = logits.shape
    row_stride, class_stride = logits.stride()
    grad = torch.empty(batch, classes, dtype=logits.dtype) if out is None else out
    stats = torch.empty(5, batch)
    bad_row = _cpu.guidance_gradient(
        logits.data_ptr(),
        row_stride,
        class_stride,
        labels.data_ptr(),
        labels.stride(0),
        batch,
        classes,
        _STORAGE[logits.dtype],
        divergence,
        order,
        alpha,
        epsilon,
        joint_temperature,
        marginal_temperature,
        entropy_weight,
        adaptive_entropy,
        grad.data_ptr(),
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise ValueError(f"labels[{bad_row}] is {labels[bad_row].item()}; allowed is 0..{classes - 1}")
    return grad, stats


def tilt_weights(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    """Weights of the images of one tilt group, (B,) fp32."""
    if scores.dtype is not torch.float32:
        scores = scores.float()
    count = scores.shape[0]
    weights = torch.empty(count)
    _cpu.tilt_weights(scores.data_ptr(), scores.stride(0), count, tilt, normalize_sum, max_weight, weights.data_ptr())
    return weights
