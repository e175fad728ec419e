"""What a classifier said and whether it was right: the top label's confidence, and the figures one asks for first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calguide_fast.ops import checks
from calguide_fast.ops import top_label as op
from calguide_fast.ops.smooth_ece import smooth_ece


class TopLabel(NamedTuple):
    """The class that a classifier holds for the likeliest."""

    confidence: Tensor  # (n,) its probability, float32 or float64
    correct: Tensor  # (n,) bool, whether it is the label


class Calibration(NamedTuple):
    """How well a classifier's confidence agrees with its accuracy on n samples; Python numbers."""

    smooth_ece: float
    bandwidth: float  # σ at which it was taken
    accuracy: float
    confidence: float  # mean probability of the top label
    cross_entropy: float  # nats
    samples: int


def top_label(logits: Tensor, labels: Tensor) -> TopLabel:
    """The confidence in the top label, differentiable, and whether it is right.

    Args:
        logits: (n, num_classes), n ≥ 1; half precision is widened to float32.
        labels: (n,) integers.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, no samples, or (on a CPU) a label out of range.
    """
    _check_shape(logits)
    confidence, _, correct = op.top_label(logits, labels)
    return TopLabel(confidence, correct)


@torch.no_grad()
def measure_calibration(logits: Tensor, labels: Tensor, bandwidth: float | None = None) -> Calibration:
    """Smooth ECE of the top label, accuracy, mean confidence and cross-entropy of logits (n, num_classes).

    Args:
        logits: (n, num_classes), n ≥ 1.
        labels: (n,) integers.
        bandwidth: σ of the smooth ECE, or None for the one at which σ and value agree.

    Raises:
        TypeError, ValueError: as :func:`top_label`.
    """
    confidence, correct = top_label(logits, labels)
    value, sigma = smooth_ece(confidence, correct, bandwidth)
    return Calibration(
        smooth_ece=value.item(),
        bandwidth=float(sigma),
        accuracy=correct.double().mean().item(),
        confidence=confidence.double().mean().item(),
        cross_entropy=F.cross_entropy(widened(logits), labels.long()).item(),
        samples=len(labels),
    )


def check_predictions(logits: Any, labels: Any) -> None:
    """Raise unless these are logits (n, num_classes) and labels (n,) of at least one sample, on one device."""
    _check_shape(logits)
    labels = checks.logits_and_labels(logits, labels)
    # on a GPU a look at the labels would be a wait
    if labels.device.type == "cpu":
        checks.check_labels(labels, logits.shape[1])


def _check_shape(logits: Any) -> None:
    checks.floating("logits", logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (n, num_classes), neither of them 0")


def widened(logits: Tensor) -> Tensor:
    """In float64 as they are, otherwise in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
