"""Calibration losses to train with, beside cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calguide_fast.backends.outcomes import check_outcomes
from calguide_fast.calibration.predictions import top_label
from calguide_fast.ops import checks
from calguide_fast.ops.smooth_ece import LEAST_BANDWIDTH, smooth_ece_from_logits


def huber_ece(confidence: Tensor, correct: Tensor, beta: float = 1e-3) -> Tensor:
    """(1/n) Σ √((p̂_i − a_i)² + β): the loss that the paper calls Smooth ECE, averaged sample by sample.

    It measures no calibration. Of a top label that is right with probability a, it expects about a(1−p̂) + (1−a)p̂,
    which is linear in p̂ and smallest not at p̂ = a but at p̂ = 1 wherever a > ½: an improper loss, which pays for
    confidence where the classifier is mostly right. What it does for calibration it does on samples that are wrong.
    Use it beside cross-entropy, and watch the mean confidence against the accuracy, and the smooth ECE of held-out
    samples, not this loss. Its smallest value is √β, not 0.

    Args:
        confidence: (n,) p̂, the top label's probability, in 0..1; n ≥ 1. Differentiable.
        correct: (n,) a, bool or numbers 0 and 1: whether the top label is right.
        beta: β > 0, rounds the corner of |p̂ − a|.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, no samples, β ≤ 0; on a CPU also a confidence outside
            0..1 or NaN, or outcomes other than 0 and 1.

    Source: arXiv 2511.05844.
    """
    beta = _positive("beta", beta)
    checks.floating("confidence", confidence)
    if confidence.ndim != 1 or len(confidence) == 0:
        raise ValueError(f"confidence has shape {tuple(confidence.shape)}; it must be (n,) with n at least 1")
    checks.shaped("correct", correct, tuple(confidence.shape))
    checks.same_device("correct", correct, "confidence", confidence)
    if confidence.device.type == "cpu":
        check_outcomes(confidence, correct, None)
    dtype = torch.float64 if confidence.dtype == torch.float64 else torch.float32
    gap = confidence.to(dtype) - correct.to(dtype)
    return (gap.square() + beta).sqrt().mean()


class HuberECELoss(nn.Module):
    """:func:`huber_ece` of a classifier's top label: the paper's own loss, beside cross-entropy.

    ``HuberECELoss()(logits, labels)`` is a scalar, differentiable in the logits (n, num_classes); labels are (n,)
    integers. It is improper and rewards confidence; :func:`huber_ece` says what to watch.

    Args:
        beta: β > 0.
    """

    def __init__(self, beta: float = 1e-3) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return huber_ece(*top_label(logits, labels), self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class SmoothECELoss(nn.Module):
    """Smooth ECE of a classifier's top label, through its kernel: a loss beside cross-entropy.

    ``SmoothECELoss()(logits, labels)`` is a scalar, differentiable in the logits (n, num_classes); labels are (n,)
    integers. It sees groups of samples, not single ones, and is 0 where confidence and accuracy agree; see
    :func:`calguide_fast.smooth_ece`.

    Never use it alone: it is 0, too, for a classifier that always names one class with that class's frequency as its
    confidence. Watch held-out accuracy and cross-entropy. Of a batch of n it is biased upward, by chance some 1/√n,
    so that small batches (below a few hundred) mostly see noise. Training samples that the classifier already knows by
    heart are all correct, and the loss then asks for *more* confidence: fine-tune on data that it has not memorised
    (held out, or augmented), and compare held-out values before and after.

    Args:
        bandwidth: σ in 0.001..1, fixed, or None for the one at which σ and value agree. It is in units of confidence,
            and no number of bins.

    Source: Błasiok & Nakkiran, ICLR 2024, arXiv 2309.12236.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__()
        self.bandwidth = (
            None if bandwidth is None else checks.number("bandwidth", bandwidth, low=LEAST_BANDWIDTH, high=1.0)
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return smooth_ece_from_logits(logits, labels, bandwidth=self.bandwidth).value

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}"


def _positive(name: str, value: Any) -> float:
    result = checks.number(name, value, low=0.0)
    if result == 0.0:
        raise ValueError(f"{name}={value!r} must be greater than 0")
    return result
