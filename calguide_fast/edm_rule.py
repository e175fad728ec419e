"""EluCD's rule for guiding EDM's Heun: a step along the gradient's direction, as long as the noise level's share says.

At the start of step i of K, with x in EDM's scaling and rms each image's own root mean square over its elements:

    g = ∇ score at x / max(rms(x), 1)
    x ← x + rms(x) c_i g / rms(g),   c_i = max(m (1 − i/(K+1)), 1e-5) + m a sin(πi/K)

The model is evaluated where that and the churn's noise lead to; Heun's correction is not guided. The gradient's size,
and so ``scale``, cancels, but for its sign; a gradient of 0 adds 0.

Source: Ma et al., *Elucidating the Design Space of Classifier-Guided Diffusion Generation*, arXiv 2310.11311.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calguide_fast.karras import Solve

LEAST = 1e-5  # of c_i's falling part


def classified_at(x: Tensor) -> Tensor:
    """Where the gradient is taken: x, (B, C, *spatial), shrunk to a root mean square of at most 1."""
    return x / _rms(x).clamp(min=1)


def shift(x: Tensor, gradient: Tensor, row: Tensor, max_guidance: float, add_factor: float) -> Tensor:
    """What the rule adds to x.

    Args:
        x: (B, C, *spatial) float32.
        gradient: of the score, the same shape.
        row: of :meth:`calguide_fast.karras.KarrasLevels.table`.
        max_guidance: m.
        add_factor: a.
    """
    strength = (max_guidance * row[Solve.DECREASE]).clamp(min=LEAST) + max_guidance * add_factor * row[Solve.SINE]
    # by the largest element first: the squares of a small gradient would be 0
    gradient = gradient.float()
    size = gradient.abs().amax(_elements(x), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    direction = gradient / size
    length = _rms(direction)
    return direction * (_rms(x) * strength / torch.where(length == 0, 1.0, length))


def _elements(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(_elements(x), keepdim=True).sqrt()
