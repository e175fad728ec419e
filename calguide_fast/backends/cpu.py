"""CPU backend: vectorised C++ kernels, called with raw pointers, sizes and strides.

Arguments arrive checked; see `calguide_fast.ops` for what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch first: the kernels then share its OpenMP runtime
from calguide_fast import _cpu


def tilt_weights(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    """Weights of the images of one tilt group, (B,) fp32."""
    if scores.dtype is not torch.float32:
        scores = scores.float()
    count = scores.shape[0]
    weights = torch.empty(count)
    _cpu.tilt_weights(
        scores.data_ptr(), scores.stride(0), count, tilt, normalize_sum, max_weight, weights.data_ptr()
    )
    return weights
