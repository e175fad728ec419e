"""Triton backend: kernels compiled when first called, for CUDA and ROCm devices.

Arguments arrive checked; see `calguide_fast.ops` for what they mean. No call waits for the device, so a label out of
range is no error here: its row, or its confidence, comes back as NaN.
"""

from __future__ import annotations

import triton

from calguide_fast.backends.triton.guidance import guidance_gradient
from calguide_fast.backends.triton.noise import philox_normal
from calguide_fast.backends.triton.smooth_ece import smooth_ece
from calguide_fast.backends.triton.smooth_ece_gradient import smooth_ece_gradient
from calguide_fast.backends.triton.step import guided_step, predict_x0
from calguide_fast.backends.triton.tilt import tilt_weights
from calguide_fast.backends.triton.top_label import top_label, top_label_backward

__all__ = [
    "describe",
    "guidance_gradient",
    "guided_step",
    "philox_normal",
    "predict_x0",
    "smooth_ece",
    "smooth_ece_gradient",
    "tilt_weights",
    "top_label",
    "top_label_backward",
]


def describe() -> str:
    """What compiles the kernels, such as "Triton 3.6.0"."""
    return f"Triton {triton.__version__}"
