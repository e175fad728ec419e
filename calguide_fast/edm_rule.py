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
from calguide_fast.scratch import Scratch

LEAST = 1e-5  # of c_i's falling part


def classified_at(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Where the gradient is taken: x, (B, C, *spatial) float32, shrunk to a root mean square of at most 1.

    And rms(x), (B, 1, ...), before that.
    """
    seen = scratch.take("seen", x)
    size = _rms(x, seen)
    return torch.div(x, size.clamp(min=1), out=seen), size


def shift(
    x_size: Tensor, gradient: Tensor, row: Tensor, max_guidance: float, add_factor: float, scratch: Scratch
) -> Tensor:
    """What the rule adds to x, in a buffer.

    Args:
        x_size: rms(x), (B, 1, ...).
        gradient: of the score, (B, C, *spatial) float32.
        row: of :meth:`calguide_fast.karras.KarrasLevels.table`.
        max_guidance: m.
        add_factor: a.
        scratch: where the result and what is squared on the way may lie.
    """
    direction, squares = (
        scratch.take(name, gradient, layout=torch.preserve_format) for name in ("direction", "squares")
    )
    strength = (max_guidance * row[Solve.DECREASE]).clamp(min=LEAST) + max_guidance * add_factor * row[Solve.SINE]
    # by the largest element first: the squares of a small gradient would be 0
    largest = torch.abs(gradient, out=direction).amax(_elements(gradient), keepdim=True)
    torch.div(gradient, largest.clamp(min=torch.finfo(torch.float32).tiny), out=direction)
    length = _rms(direction, squares)
    return direction.mul_(x_size * strength / torch.where(length == 0, 1.0, length))


def _elements(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _rms(x: Tensor, squares: Tensor) -> Tensor:
    """(B, 1, ...); ``squares`` is a buffer."""
    return torch.square(x, out=squares).mean(_elements(x), keepdim=True).sqrt()
