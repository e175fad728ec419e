"""smooth_ece: how far confidences are from the frequencies of being right, with no bins."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from calguide_fast import backends
from calguide_fast.backends.outcomes import check_outcomes
from calguide_fast.backends.smooth_ece import CURVE_LENGTH, LEAST_BANDWIDTH
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, applied, dispatched, is_direct, may_be_differentiated, once
from calguide_fast.ops.top_label import top_label

LIBRARY.define(
    "smooth_ece(Tensor confidence, Tensor correct, Tensor? weights, float bandwidth, bool with_curve) "
    "-> (Tensor value, Tensor bandwidth, Tensor curve)"
)
LIBRARY.define(
    "smooth_ece_gradient(Tensor confidence, Tensor correct, Tensor? weights, Tensor curve, Tensor value_grad) -> Tensor"
)


class SmoothECE(NamedTuple):
    """The result of :func:`smooth_ece`: two scalar tensors.

    Attributes:
        value: the smooth ECE, in [0, 1]; differentiable in the confidences.
        bandwidth: σ of the kernel it was measured with, equal to the value where that is a fixpoint; detached.
    """

    value: Tensor
    bandwidth: Tensor


def smooth_ece(
    confidence: Tensor, correct: Tensor, bandwidth: float | None = None, weights: Tensor | None = None
) -> SmoothECE:
    r"""The smooth expected calibration error (smECE) of confidences f_i and outcomes y_i.

    With residuals smoothed by the Gaussian kernel K_σ reflected at 0 and 1,

        R_σ(t) = Σ_i w_i K_σ(t, f_i) (f_i − y_i) / Σ_i w_i,      smECE_σ = ∫₀¹ |R_σ(t)| dt,

    and smECE is the σ* at which smECE_σ* = σ*. It lies between |mean(f − y)| and mean |f − y|, is 0 only where the
    residuals cancel, and changes continuously with the confidences.

    Differentiable once in ``confidence``, through the fixpoint too; not in ``weights`` or ``correct``. The backward
    pass reads the samples again, which must not have changed by then. Works under ``torch.func`` and ``torch.compile``,
    though not where the transform is compiled as well.

    Args:
        confidence: (n,) in [0, 1], float32, bfloat16, float16 or float64; computed in float64 whatever the dtype.
        correct: (n,) outcomes, bool, or 0 and 1 of any integer or floating dtype.
        bandwidth: σ ≥ 0.001 to measure with, in units of confidence; None for the fixpoint.
        weights: (n,) non-negative weights of the samples, of a sum between 1e-270 and 1e270; None for equal ones.

    Returns:
        ``SmoothECE(value, bandwidth)``, scalars in float32 (float64 for float64). The bandwidth is never below 0.001:
        where the fixpoint would be, the value is smECE at σ = 0.001, at most 0.001 itself. Residuals that are all
        zero give value 0 and gradient 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or setting. On the CPU also a confidence outside [0, 1] or
            NaN, an outcome that is neither 0 nor 1, weights that are negative, not finite, all zero or of an extreme
            sum; on a GPU, which is not waited for, these make value, bandwidth and gradient NaN.

    Source: Błasiok and Nakkiran, *Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing*, ICLR 2024,
    arXiv 2309.12236. A mass of confidences at exactly 0 or 1 counts in full.
    """
    sigma = _check_inputs(confidence, correct, bandwidth, weights)
    if may_be_differentiated(confidence):
        value, found, _ = applied(_Differentiable, confidence, correct, weights, sigma)
    else:
        value, found, _ = _measure(confidence, correct, weights, sigma, False)
    return SmoothECE(value, found)


def smooth_ece_from_logits(
    logits: Tensor,
    labels: Tensor,
    bandwidth: float | None = None,
    weights: Tensor | None = None,
    classwise: bool = False,
) -> SmoothECE:
    """The smooth ECE of a classifier: of its top probability, or the mean over its classes.

    Softmax, top class and correctness are taken in one pass over the logits. Classwise, the classes are measured one
    after the other.

    Args:
        logits: (n, C), float32, bfloat16, float16 or float64; the result is differentiable in them.
        labels: (n,) integers in 0..C−1.
        bandwidth: as in :func:`smooth_ece`.
        weights: as in :func:`smooth_ece`.
        classwise: the mean over classes c of the smooth ECE of (softmax(f)_c, 1[y = c]) instead of that of
            (max softmax(f), 1[argmax f = y]).

    Returns:
        ``SmoothECE(value, bandwidth)``; classwise, both are means over the classes.

    Raises:
        TypeError, ValueError: as :func:`smooth_ece`; on the CPU also labels outside 0..C−1, which on a GPU give NaN.
    """
    checks.floating("logits", logits)
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (n, C), both at least 1")
    if not classwise:
        confidence, _, correct = top_label(logits, labels)
        return smooth_ece(confidence, correct, bandwidth, weights)
    labels = checks.logits_and_labels(logits, labels)
    p = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
    if labels.device.type != "cpu":
        p = p.masked_fill(((labels < 0) | (labels >= logits.shape[1]))[:, None], torch.nan)
    elif is_direct(labels):
        checks.check_labels(labels, logits.shape[1])
    # once for all classes, which would each gather their own from as many places in memory as there are samples
    columns = p.t().contiguous()
    each = [smooth_ece(p_c, labels == c, bandwidth, weights) for c, p_c in enumerate(columns)]
    return SmoothECE(
        torch.stack([found.value for found in each]).mean(), torch.stack([found.bandwidth for found in each]).mean()
    )


def _check_inputs(confidence: Tensor, correct: Tensor, bandwidth: float | None, weights: Tensor | None) -> float:
    """The bandwidth as the op has it: 0 for the fixpoint."""
    checks.floating("confidence", confidence)
    if confidence.ndim != 1 or not confidence.shape[0]:
        raise ValueError(f"confidence has shape {tuple(confidence.shape)}; it must be (n,) with n at least 1")
    checks.shaped("correct", correct, confidence.shape)
    if correct.is_complex():
        raise TypeError(f"correct has dtype {correct.dtype}; it must be bool, or 0 and 1 of a real dtype")
    checks.same_device("correct", correct, "confidence", confidence)
    if weights is not None:
        checks.floating("weights", weights)
        checks.shaped("weights", weights, confidence.shape)
        checks.same_device("weights", weights, "confidence", confidence)
    return 0.0 if bandwidth is None else checks.number("bandwidth", bandwidth, low=LEAST_BANDWIDTH)


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float) -> tuple[Tensor, ...]:
        return _measure(confidence, correct, weights, bandwidth, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, sigma, curve = output
        ctx.mark_non_differentiable(sigma, curve)
        ctx.save_for_backward(*inputs[:3], curve)
        if not torch.compiler.is_compiling():
            # no zeros for the outputs that have no gradient
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if value_grad is None:
            return None, None, None, None
        return once("smooth_ece", _gradient, *ctx.saved_tensors, value_grad), None, None, None


def _measure(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op itself: value and bandwidth, and what the gradient needs (CURVE_LENGTH,) if asked for, else (0,)."""
    if is_direct(confidence, correct, weights):
        return _impl(confidence, correct, weights, bandwidth, with_curve)
    return dispatched(torch.ops.calguide_fast.smooth_ece, confidence, correct, weights, bandwidth, with_curve)


def _gradient(confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor) -> Tensor:
    """The value's gradient times `value_grad`, (n,) in the confidences' dtype, from the curve measured for them."""
    if is_direct(confidence, correct, weights, curve, value_grad):
        return _gradient_impl(confidence, correct, weights, curve, value_grad)
    op = torch.ops.calguide_fast.smooth_ece_gradient
    return dispatched(op, confidence, correct, weights, curve, value_grad)


def _result_dtype(confidence: Tensor) -> torch.dtype:
    return torch.float64 if confidence.dtype == torch.float64 else torch.float32


@torch.library.impl(LIBRARY, "smooth_ece", "CompositeExplicitAutograd")
def _impl(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _result_dtype(confidence)
    # a conversion to its own dtype costs as much as the rest of this
    confidence = confidence if confidence.dtype is dtype else confidence.to(dtype)
    weights = None if weights is None else weights.to(dtype)
    if correct.dtype != torch.bool:
        if confidence.device.type == "cpu":
            check_outcomes(confidence, correct, weights)
        else:
            confidence = confidence.where((correct == 0) | (correct == 1), torch.nan)
        correct = correct != 0
    return backends.choose(confidence, "smooth_ece").smooth_ece(confidence, correct, weights, bandwidth, with_curve)


@torch.library.impl(LIBRARY, "smooth_ece_gradient", "CompositeExplicitAutograd")
def _gradient_impl(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor
) -> Tensor:
    dtype = _result_dtype(confidence)
    weights = None if weights is None else weights.to(dtype)
    correct = correct if correct.dtype == torch.bool else correct != 0
    value_grad = value_grad if value_grad.dtype is dtype else value_grad.to(dtype)
    backend = backends.choose(confidence, "smooth_ece")
    return backend.smooth_ece_gradient(confidence, correct, weights, curve, value_grad)


@torch.library.register_fake("calguide_fast::smooth_ece", lib=LIBRARY)
def _fake(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float, with_curve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    value, sigma = (confidence.new_empty((), dtype=_result_dtype(confidence)) for _ in range(2))
    return value, sigma, confidence.new_empty(CURVE_LENGTH if with_curve else 0, dtype=torch.float64)


@torch.library.register_fake("calguide_fast::smooth_ece_gradient", lib=LIBRARY)
def _gradient_fake(
    confidence: Tensor, correct: Tensor, weights: Tensor | None, curve: Tensor, value_grad: Tensor
) -> Tensor:
    return confidence.new_empty(confidence.shape)


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    return [
        op(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]


@torch.library.register_vmap("calguide_fast::smooth_ece", lib=LIBRARY)
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    # each fixpoint has a bandwidth of its own
    each = _one_by_one(torch.ops.calguide_fast.smooth_ece, info, in_dims, arguments)
    return tuple(torch.stack(part) for part in zip(*each, strict=True)), (0, 0, 0)


@torch.library.register_vmap("calguide_fast::smooth_ece_gradient", lib=LIBRARY)
def _gradient_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return torch.stack(_one_by_one(torch.ops.calguide_fast.smooth_ece_gradient, info, in_dims, arguments)), 0
