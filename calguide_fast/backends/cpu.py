"""CPU backend: vectorised C++ kernels."""

from __future__ import annotations

import torch

# torch first: the kernels then share its OpenMP runtime
from calguide_fast import _cpu
from calguide_fast.backends.native import NativeKernels

_INSTRUCTION_SETS = {"v4": "AVX-512 (v4)", "v3": "AVX2 (v3)", "baseline": "baseline instructions"}

_kernels = NativeKernels(_cpu, lambda tensor: torch.get_num_threads())
guidance_gradient = _kernels.guidance_gradient
tilt_weights = _kernels.tilt_weights
predict_x0 = _kernels.predict_x0
guided_step = _kernels.guided_step
philox_normal = _kernels.philox_normal
top_label = _kernels.top_label
top_label_backward = _kernels.top_label_backward
smooth_ece = _kernels.smooth_ece
smooth_ece_gradient = _kernels.smooth_ece_gradient

# the functions that read plain tensors by themselves, if this version of torch lets them
plain = _cpu if _cpu.know_plain_tensors(torch) else None


def describe() -> str:
    """Language, instruction set and threads of the kernels, such as "C++, AVX-512 (v4), OpenMP"."""
    return f"C++, {_INSTRUCTION_SETS[_cpu.isa()]}, {'OpenMP' if _cpu.openmp() else 'one thread'}"
