"""CPU backend: vectorised C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# torch first: the kernels then share its OpenMP runtime
from calguide_fast import _cpu
from calguide_fast.backends.native import NativeKernels
from calguide_fast.backends.outcomes import check_outcomes

_INSTRUCTION_SETS = {"v4": "AVX-512 (v4)", "v3": "AVX2 (v3)", "baseline": "baseline instructions"}

_kernels = NativeKernels(_cpu, lambda tensor: torch.get_num_threads())
guidance_gradient = _kernels.guidance_gradient
tilt_weights = _kernels.tilt_weights
predict_x0 = _kernels.predict_x0
guided_step = _kernels.guided_step
philox_normal = _kernels.philox_normal
top_label = _kernels.top_label
top_label_backward = _kernels.top_label_backward


def smooth_ece(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Value and bandwidth (2,), gradient (n,) or (0,); confidences and weights fp32 or float64, correct bool."""
    confidence, correct = confidence.contiguous(), correct.contiguous()
    weights = None if weights is None else weights.contiguous()
    stats = confidence.new_empty(2)
    grad = confidence.new_empty(len(confidence) if with_gradient else 0)
    allowed = _cpu.smooth_ece(
        torch.get_num_threads(),
        confidence.data_ptr(),
        correct.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        len(confidence),
        confidence.dtype is torch.float64,
        bandwidth,
        stats.data_ptr(),
        grad.data_ptr() if with_gradient else 0,
    )
    if not allowed:
        check_outcomes(confidence, correct, weights)
    return stats, grad


def describe() -> str:
    """Language, instruction set and threads of the kernels, such as "C++, AVX-512 (v4), OpenMP"."""
    return f"C++, {_INSTRUCTION_SETS[_cpu.isa()]}, {'OpenMP' if _cpu.openmp() else 'one thread'}"
