"""CPU backend: vectorised C++ kernels, called with raw pointers, sizes and strides.

Arguments arrive checked; see `calguide_fast.ops` for what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# torch first: the kernels then share its OpenMP runtime
from calguide_fast import _cpu
from calguide_fast.backends.labels import check_labels

_INSTRUCTION_SETS = {"v4": "AVX-512 (v4)", "v3": "AVX2 (v3)", "baseline": "baseline instructions"}

# codes of csrc/storage.h
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def describe() -> str:
    """Language, instruction set and threads of the kernels, such as "C++, AVX-512 (v4), OpenMP"."""
    return f"C++, {_INSTRUCTION_SETS[_cpu.isa()]}, {'OpenMP' if _cpu.openmp() else 'one thread'}"


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
    # new_empty spares a small call the 0.7 us of a dtype by keyword, and heeds no default dtype or device
    grad = logits.new_empty(batch, classes) if out is None else out
    stats = logits.new_empty(5, batch) if logits.dtype is torch.float32 else torch.empty(5, batch, dtype=torch.float32)
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
        check_labels(labels, classes)
    return grad, stats


def tilt_weights(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    """Weights of the images of one tilt group, (B,) fp32."""
    if scores.dtype is not torch.float32:
        scores = scores.float()
    count = scores.shape[0]
    weights = scores.new_empty(count)
    _cpu.tilt_weights(scores.data_ptr(), scores.stride(0), count, tilt, normalize_sum, max_weight, weights.data_ptr())
    return weights


def predict_x0(x_t: Tensor, model_output: Tensor, coefficients: Tensor, clip: bool, out: Tensor) -> Tensor:
    """Prediction of x0 from x_t and eps, written to `out` in its dtype and strides."""
    elements = x_t.numel()
    if not elements:
        return out
    shape = x_t.shape
    batch, channels = shape[0], shape[1]
    target, strides = out, None
    if not (x_t.is_contiguous() and model_output.is_contiguous() and out.is_contiguous()):
        x_t, model_output, target = _steppable(x_t), _steppable(model_output), _steppable(out)
        strides = _strides(x_t, model_output, target)
    _cpu.predict_x0(
        batch, channels, elements // (batch * channels), torch.get_num_threads(), strides,
        coefficients.data_ptr(), clip, x_t.data_ptr(),
        model_output.data_ptr(), _STORAGE[model_output.dtype], model_output.shape[1] != channels,
        target.data_ptr(), _STORAGE[out.dtype],
    )  # fmt: skip
    return out if target is out else out.copy_(target)


def guided_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    variance_max: Tensor | None,
    method: int,
    learned_variance: bool,
    scale: float,
    tilt: float,
    max_weight: float,
    normalize_sum: bool,
    sine_boost: float,
    clip: bool,
    out: Tensor,
) -> Tensor:
    """One guided DDPM (method 0) or DDIM (1) step from x_t to x_prev, written to `out`, which may be x_t itself."""
    elements = x_t.numel()
    if not elements:
        return out
    shape = x_t.shape
    batch, channels = shape[0], shape[1]
    strides = None
    if not (
        x_t.is_contiguous()
        and model_output.is_contiguous()
        and (gradient is None or gradient.is_contiguous())
        and (noise is None or noise.is_contiguous())
    ):
        x_t, model_output = _steppable(x_t), _steppable(model_output)
        gradient = None if gradient is None else _steppable(gradient)
        noise = None if noise is None else _steppable(noise)
        strides = _strides(x_t, model_output, gradient, noise)
    # the vectors over images are read densely; a running maximum with gaps is written back
    weights = None if weights is None else weights.contiguous()
    scores = None if scores is None else scores.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    running_max = None if variance_max is None else variance_max.contiguous()
    _cpu.guided_step(
        batch, channels, elements // (batch * channels), torch.get_num_threads(), strides,
        coefficients.data_ptr(), clip, x_t.data_ptr(),
        model_output.data_ptr(), _STORAGE[model_output.dtype], learned_variance,
        None if gradient is None else gradient.data_ptr(), 0 if gradient is None else _STORAGE[gradient.dtype],
        None if noise is None else noise.data_ptr(), out.data_ptr(),
        None if weights is None else weights.data_ptr(), None if scores is None else scores.data_ptr(),
        None if seeds is None else seeds.data_ptr(), None if running_max is None else running_max.data_ptr(),
        method == 1, scale, tilt, max_weight, normalize_sum, sine_boost,
    )  # fmt: skip
    if variance_max is not None and running_max is not None and running_max is not variance_max:
        variance_max.copy_(running_max)
    return out


def philox_normal(seeds: Tensor, shape: Sequence[int], draw: int, stream: int) -> Tensor:
    """Standard normals of images of `shape`, (B, *shape) fp32: a function of seed, draw and stream alone."""
    seeds = seeds.contiguous()
    out = torch.empty((len(seeds), *shape), dtype=torch.float32)
    _cpu.philox_normal(
        seeds.data_ptr(), len(seeds), math.prod(shape), draw, stream, out.data_ptr(), torch.get_num_threads()
    )
    return out


def _steppable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where no one stride steps through its pixels."""
    return tensor.contiguous() if _pixel_stride(tensor) is None else tensor


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """(image, channel, pixel) strides of each tensor, one after the other; zeros for an absent one."""
    strides: list[int] = []
    for tensor in tensors:
        strides += (0, 0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1), _pixel_stride(tensor) or 0)
    return tuple(strides)


def _pixel_stride(tensor: Tensor) -> int | None:
    pixel = following = None
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size == 1:
            continue
        if pixel is None:
            pixel = stride
        elif stride != following:
            return None
        following = size * stride
    return 1 if pixel is None else pixel
