"""Networks without parameters to store: what the golden trajectories were sampled with."""

from __future__ import annotations

import torch
from torch import Tensor


def _weights(rows: int, columns: int, phase: float) -> Tensor:
    return torch.cos(torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) * 1.7 + phase)


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """ε̂ and v of (B, 3, 4, 4) images."""
    level = (t.float() / 1000)[:, None, None, None]
    label = torch.sin(y.float())[:, None, None, None]
    mixed = torch.einsum("oc,bchw->bohw", _weights(6, 3, 0.3) / 3, x)
    return torch.tanh(mixed + 0.2 * label) * (0.5 + level)


def guide(x: Tensor, t: Tensor | None = None) -> Tensor:
    """Logits of five classes, of a clean image or, with its time, of a noisy one."""
    if t is not None:
        x = x * (1.2 - t.float() / 1000)[:, None, None, None]
    return 3 * torch.tanh(x.flatten(1) @ (_weights(48, 5, 0.9) / 7)) + x.mean((1, 2, 3))[:, None]
