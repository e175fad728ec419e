"""Predictions whose calibration is known: logits that are right as often as their softmax says, times a factor."""

from __future__ import annotations

import torch
from torch import Tensor


def predictions(
    count: int = 2000, classes: int = 4, overconfidence: float = 1.0, spread: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Float64 logits (count, classes) and labels drawn from the softmax of logits / overconfidence."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return overconfidence * logits, labels
