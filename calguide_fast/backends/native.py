"""From tensors to the pointers, sizes and strides that the compiled kernels of every device take.

Arguments arrive checked; see `calguide_fast.ops` for what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from calguide_fast.backends.labels import check_labels
from calguide_fast.backends.layout import image_strides, steppable
from calguide_fast.backends.outcomes import check_outcomes
from calguide_fast.backends.smooth_ece import CURVE_LENGTH

_FLOAT32 = torch.float32
# codes of csrc/storage.h
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeKernels:
    """The functions of a backend over a compiled module.

    Args:
        native: the compiled module.
        place: gives the first argument of all its functions: where a tensor's kernel is to run.
    """

    def __init__(self, native: ModuleType, place: Callable[[Tensor], Any]) -> None:
        self.native = native
        self.place = place
        # doubles in which a GPU's launches leave each other what they find; a name that is not there costs 0.5 us
        self._search_scratch = getattr(native, "smooth_ece_scratch", 0)
        self._gradient_scratch = getattr(native, "smooth_ece_gradient_scratch", 0)

    def guidance_gradient(
        self,
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
        """Gradient (B, C) in the logits' dtype and statistics (5, B) fp32.

        A label out of range is a ValueError where the kernels look at labels first, else its row is NaN.
        """
        batch, classes = logits.shape
        row_stride, class_stride = logits.stride()
        # new_empty spares a small call the 0.7 us of a dtype by keyword, and heeds no default dtype or device
        grad = logits.new_empty(batch, classes) if out is None else out
        dtype = logits.dtype
        stats = logits.new_empty(5, batch) if dtype is _FLOAT32 else logits.new_empty(5, batch, dtype=_FLOAT32)
        bad_row = self.native.guidance_gradient(
            self.place(logits),
            logits.data_ptr(),
            row_stride,
            class_stride,
            batch,
            classes,
            _STORAGE[dtype],
            labels.data_ptr(),
            labels.stride()[0],
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
        )
        if bad_row >= 0:
            check_labels(labels, classes)
        return grad, stats

    def top_label(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The largest probability (n,) fp32, its class (n,) int64 and whether that is the label (n,).

        A label out of range is a ValueError where the kernels look at labels first, else its row's confidence is NaN.
        """
        batch, classes = logits.shape
        row_stride, class_stride = logits.stride()
        confidence = (
            logits.new_empty(batch) if logits.dtype is torch.float32 else logits.new_empty(batch, dtype=torch.float32)
        )
        top = labels.new_empty(batch)
        correct = labels.new_empty(batch, dtype=torch.bool)
        bad_row = self.native.top_label(
            self.place(logits), logits.data_ptr(), row_stride, class_stride, batch, classes, _STORAGE[logits.dtype],
            labels.data_ptr(), labels.stride(0), confidence.data_ptr(), top.data_ptr(), correct.data_ptr(),
        )  # fmt: skip
        if bad_row >= 0:
            check_labels(labels, classes)
        return confidence, top, correct

    def top_label_backward(self, grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
        """The confidences' gradient in the logits, (n, C) in their dtype."""
        batch, classes = logits.shape
        row_stride, class_stride = logits.stride()
        grad = logits.new_empty(batch, classes)
        confidence, top = confidence.contiguous(), top.contiguous()
        self.native.top_label_backward(
            self.place(logits), grad_confidence.data_ptr(), grad_confidence.stride(0),
            logits.data_ptr(), row_stride, class_stride, batch, classes, _STORAGE[logits.dtype],
            confidence.data_ptr(), top.data_ptr(), grad.data_ptr(),
        )  # fmt: skip
        return grad

    def smooth_ece(
        self, confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value and bandwidth, and what the gradient needs (CURVE_LENGTH,) or (0,).

        Confidences and weights are fp32 or float64, correct is bool. A sample that is not allowed, or weights whose
        sum is not, are a ValueError where the kernels tell of them, else all results are NaN.
        """
        confidence, correct = confidence.contiguous(), correct.contiguous()
        weights = None if weights is None else weights.contiguous()
        value = confidence.new_empty(())
        sigma = torch.empty_like(value)
        curve = confidence.new_empty(CURVE_LENGTH if with_curve else 0, dtype=torch.float64)
        scratch = _doubles(self._search_scratch, confidence)
        allowed = self.native.smooth_ece(
            self.place(confidence), confidence.data_ptr(), correct.data_ptr(),
            0 if weights is None else weights.data_ptr(), confidence.numel(), confidence.dtype is torch.float64,
            bandwidth, value.data_ptr(), sigma.data_ptr(), curve.data_ptr() if with_curve else 0, CURVE_LENGTH,
            *(() if scratch is None else (scratch.data_ptr(),)),
        )  # fmt: skip
        if allowed is False:
            check_outcomes(confidence, correct, weights)
            # its sum is in another order
            raise ValueError("the sum of the weights is at the edge of what can be divided by")
        return value, sigma, curve

    def smooth_ece_gradient(
        self, confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor
    ) -> Tensor:
        """The gradient of the value that `curve` was left for times `value_grad`, (n,) in the confidences' dtype.

        Weights and value_grad are float64 where the confidences are, else fp32.
        """
        confidence, correct, curve = confidence.contiguous(), correct.contiguous(), curve.contiguous()
        weights = None if weights is None else weights.contiguous()
        grad = torch.empty_like(confidence)
        wide = confidence.dtype is torch.float64
        scratch = _doubles(self._gradient_scratch, confidence)
        self.native.smooth_ece_gradient(
            self.place(confidence), confidence.data_ptr(), 0 if wide else _STORAGE[confidence.dtype], wide,
            correct.data_ptr(), 0 if weights is None else weights.data_ptr(), confidence.numel(), curve.data_ptr(),
            value_grad.data_ptr(), grad.data_ptr(), *(() if scratch is None else (scratch.data_ptr(),)),
        )  # fmt: skip
        return grad

    def tilt_weights(self, scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
        """Weights of the images of one tilt group, (B,) fp32."""
        if scores.dtype is not torch.float32:
            scores = scores.float()
        count = scores.shape[0]
        weights = scores.new_empty(count)
        self.native.tilt_weights(
            self.place(scores), scores.data_ptr(), scores.stride(0), count, tilt, normalize_sum, max_weight,
            weights.data_ptr(),
        )  # fmt: skip
        return weights

    def predict_x0(self, x_t: Tensor, model_output: Tensor, coefficients: Tensor, clip: bool, out: Tensor) -> Tensor:
        """Prediction of x0 from x_t and eps, written to `out` in its dtype and strides."""
        elements = x_t.numel()
        if not elements:
            return out
        shape = x_t.shape
        batch, channels = shape[0], shape[1]
        target, strides = out, None
        if not (x_t.is_contiguous() and model_output.is_contiguous() and out.is_contiguous()):
            x_t, model_output, target = steppable(x_t), steppable(model_output), steppable(out)
            strides = _strides(x_t, model_output, target)
        self.native.predict_x0(
            self.place(x_t), batch, channels, elements // (batch * channels), strides,
            coefficients.data_ptr(), clip, x_t.data_ptr(),
            model_output.data_ptr(), _STORAGE[model_output.dtype], model_output.shape[1] != channels,
            target.data_ptr(), _STORAGE[out.dtype],
        )  # fmt: skip
        return out if target is out else out.copy_(target)

    def guided_step(
        self,
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
            x_t, model_output = steppable(x_t), steppable(model_output)
            gradient = None if gradient is None else steppable(gradient)
            noise = None if noise is None else steppable(noise)
            strides = _strides(x_t, model_output, gradient, noise)
        # the vectors over images are read densely; a running maximum with gaps is written back
        weights = None if weights is None else weights.contiguous()
        scores = None if scores is None else scores.contiguous()
        seeds = None if seeds is None else seeds.contiguous()
        running_max = None if variance_max is None else variance_max.contiguous()
        self.native.guided_step(
            self.place(x_t), batch, channels, elements // (batch * channels), strides,
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

    def philox_normal(
        self, seeds: Tensor, shape: Sequence[int], draw: int, stream: int, out: Tensor | None = None
    ) -> Tensor:
        """Standard normals of images of `shape`, (B, *shape) fp32: a function of seed, draw and stream alone.

        `out` is contiguous.
        """
        seeds = seeds.contiguous()
        batch = seeds.shape[0]
        out = seeds.new_empty((batch, *shape), dtype=_FLOAT32) if out is None else out
        self.native.philox_normal(
            self.place(seeds), seeds.data_ptr(), batch, math.prod(shape), draw, stream, out.data_ptr()
        )
        return out


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """(image, channel, pixel) strides of each tensor, one after the other."""
    return tuple(stride for tensor in tensors for stride in image_strides(tensor))


def _doubles(count: int, beside: Tensor) -> Tensor | None:
    """Memory on the tensor's device, or none if there is nothing to put there."""
    return beside.new_empty(count, dtype=torch.float64) if count else None
