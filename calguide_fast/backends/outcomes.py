"""The checks of confidences, outcomes and weights that read their values, made where that takes no wait."""

from __future__ import annotations

import torch
from torch import Tensor

# between these the total weight and its inverse may be multiplied by what they are, with no overflow or underflow
LEAST_TOTAL, MOST_TOTAL = 1e-270, 1e270


def check_outcomes(confidence: Tensor, correct: Tensor, weights: Tensor | None) -> None:
    """Raise ValueError for the first value that is not allowed, and for weights whose sum is zero or extreme."""
    _check("confidence", confidence, (confidence >= 0) & (confidence <= 1), "lie in [0, 1]")
    if correct.dtype != torch.bool:
        _check("correct", correct, (correct == 0) | (correct == 1), "be 0 or 1")
    if weights is not None:
        _check("weights", weights, (weights >= 0) & weights.isfinite(), "be finite and at least 0")
        if not bool(weights.any()):
            raise ValueError(f"weights are all 0 ({len(weights)} of them); at least one must be positive")
        total = float(weights.double().sum())
        if not LEAST_TOTAL <= total <= MOST_TOTAL:
            raise ValueError(f"weights sum to {total!r}; the sum must lie in [{LEAST_TOTAL}, {MOST_TOTAL}]")


def _check(name: str, values: Tensor, allowed: Tensor, what: str) -> None:
    if not bool(allowed.all()):
        index = int((~allowed).nonzero()[0])
        raise ValueError(f"{name}[{index}]={values[index].item()!r} must {what}")
