"""CUDA backend: compiled kernels that run on the current stream of the tensors' device and never wait for it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

if torch.version.hip:
    raise ImportError("this PyTorch is built for ROCm; the CUDA kernels need an NVIDIA GPU")
if importlib.util.find_spec("calguide_fast._cuda") is None:
    raise ImportError("the CUDA kernels are not built: there was no nvcc, or it failed, when the package was installed")

from calguide_fast import _cuda  # noqa: E402
from calguide_fast.backends.native import NativeKernels  # noqa: E402

if _cuda.unavailable():
    raise ImportError(f"the CUDA kernels are built, but there is {_cuda.unavailable()}")


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device index and raw stream."""
    index = tensor.device.index
    # what torch.cuda.current_stream wraps in an object, at a tenth of its price
    return index, torch._C._cuda_getCurrentRawStream(index)


_kernels = NativeKernels(_cuda, _place)
guidance_gradient = _kernels.guidance_gradient
tilt_weights = _kernels.tilt_weights
predict_x0 = _kernels.predict_x0
guided_step = _kernels.guided_step
philox_normal = _kernels.philox_normal


def describe() -> str:
    """Language, runtime and devices, such as "CUDA C++ 13.0, NVIDIA H200"."""
    version = _cuda.runtime_version()
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return f"CUDA C++ {version // 1000}.{version % 1000 // 10}, {', '.join(sorted(names))}"
