"""What a backend's functions for the smooth ECE give between them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def value_and_gradient(
    backend: ModuleType, confidence: Tensor, correct: Tensor, weights: Tensor | None, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """Value and bandwidth (2,), and the value's gradient (n,) in the confidences' dtype."""
    wide = confidence if confidence.dtype == torch.float64 else confidence.float()
    value, sigma, curve = backend.smooth_ece(wide, correct, weights, bandwidth, True)
    # a power of two, whose product is exact
    doubled = backend.smooth_ece_gradient(confidence, correct, weights, curve, value.new_full((), -2.0))
    return torch.stack([value, sigma]), doubled / -2
