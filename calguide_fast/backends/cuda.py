"""CUDA backend: compiled kernels that run on the current stream of the tensors' device and never wait for it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if torch.version.cuda is None:
    raise ImportError(f"this PyTorch is built {'for ROCm' if torch.version.hip else 'without CUDA'}")
if importlib.util.find_spec("calguide_fast._cuda") is None:
    raise ImportError("the CUDA kernels are not built: there was no nvcc, or it failed, when the package was installed")

from calguide_fast import _cuda  # noqa: E402
from calguide_fast.backends.native import NativeKernels  # noqa: E402

if reason := _cuda.unavailable():
    raise ImportError(f"the CUDA kernels are built, but there is {reason}")


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device index and raw stream."""
    index = tensor.device.index
    # what torch.cuda.current_stream wraps in an object, at a tenth of its price
    return index, torch._C._cuda_getCurrentRawStream(index)


def _on_its_device(kernel: Callable) -> Callable:
    """The kernel with its first tensor's device as the current one, and the one before current again afterwards."""

    @functools.wraps(kernel)
    def call(tensor: Tensor, *arguments: Any) -> Any:
        if tensor.device.index == torch._C._cuda_getDevice():
            return kernel(tensor, *arguments)
        # torch's own guard, as it wakes no device that is not in use
        with torch.cuda.device(tensor.device):
            return kernel(tensor, *arguments)

    return call


_kernels = NativeKernels(_cuda, _place)
guidance_gradient = _on_its_device(_kernels.guidance_gradient)
tilt_weights = _on_its_device(_kernels.tilt_weights)
predict_x0 = _on_its_device(_kernels.predict_x0)
guided_step = _on_its_device(_kernels.guided_step)
philox_normal = _on_its_device(_kernels.philox_normal)
top_label = _on_its_device(_kernels.top_label)
top_label_backward = _on_its_device(_kernels.top_label_backward)
smooth_ece = _on_its_device(_kernels.smooth_ece)
smooth_ece_gradient = _on_its_device(_kernels.smooth_ece_gradient)


def describe() -> str:
    """Language, runtime and devices, such as "CUDA C++ 13.0, NVIDIA H200"."""
    version = _cuda.runtime_version()
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return f"CUDA C++ {version // 1000}.{version % 1000 // 10}, {', '.join(sorted(names))}"
