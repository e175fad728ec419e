"""Checks shared by everything that reads a table of features."""

from __future__ import annotations

import numpy as np
import torch

ArrayLike = torch.Tensor | np.ndarray


def as_features(
    features: ArrayLike, name: str, at_least: int, device: torch.device | str | None = "cpu"
) -> torch.Tensor:
    """Return `features` as a finite float64 tensor (N, D) with N >= `at_least`, or raise naming `name`.

    It is moved to `device`; with None it stays where it is, if there is float64.
    """
    table = torch.as_tensor(features).detach()
    if device is None:
        device = "cpu" if table.device.type == "mps" else table.device
    table = table.to(device, torch.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"{name} must have shape (samples, features), got {tuple(table.shape)}")
    if table.shape[0] < at_least:
        raise ValueError(f"{name} has {table.shape[0]} samples, at least {at_least} are needed")
    if not torch.isfinite(table).all():
        raise ValueError(f"{name} holds NaN or infinite values, features must be finite")
    return table


def check_same_width(a: torch.Tensor, b: torch.Tensor, name_a: str, name_b: str) -> None:
    """Raise unless both tables describe samples by the same number of features."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name_a} has {a.shape[-1]} features and {name_b} has {b.shape[-1]}, they must agree")
