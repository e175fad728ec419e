"""Argument checks that several ops share. Every message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from calguide_fast.backends.labels import check_labels as check_labels

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a finite float in [low, high].

    Raises:
        TypeError: not a real number.
        ValueError: not finite, or outside the range.
    """
    # most are Python's own, and need no look at what else they might be
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer))
    ):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    result = float(value)
    # comparisons that NaN fails, too; the compiler follows them where it does not follow math.isfinite
    if not (low <= result <= high and -math.inf < result < math.inf):
        if low == -math.inf and high == math.inf:
            allowed = "finite"
        elif high == math.inf:
            allowed = f"finite and at least {low:g}"
        else:
            allowed = f"between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r} must be {allowed}")
    return result


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is an integer, of Python's or NumPy's, and no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def no_tensor(name: str, value: Any) -> TypeError:
    """The error of what should be a tensor."""
    way = "; torch.from_numpy makes one of it" if isinstance(value, np.ndarray) else ""
    return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{way}")


def floating(name: str, tensor: Any) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of float32, bfloat16, float16 or float64."""
    if not isinstance(tensor, Tensor):
        raise no_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float32, bfloat16, float16 or float64")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; they must be together")


def shaped(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is a tensor of this shape."""
    if not isinstance(tensor, Tensor):
        raise no_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")


def logits_and_labels(logits: Any, labels: Any) -> Tensor:
    """The labels as int64, unless logits are not (B, C) of a floating dtype or labels not (B,) integers beside them.

    Raises:
        TypeError: not tensors, or a wrong dtype.
        ValueError: a wrong shape, or two devices.
    """
    # one look at what is nearly always right; what is wrong is told apart afterwards
    if (
        isinstance(logits, Tensor)
        and logits.dtype in FLOAT_DTYPES
        and isinstance(labels, Tensor)
        and labels.dtype is torch.int64
        and labels.ndim == 1
        and logits.ndim == 2
        and labels.shape[0] == logits.shape[0]
        and logits.shape[1] != 0
        and labels.device == logits.device
    ):
        return labels
    floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (B, C) with at least one class")
    if not isinstance(labels, Tensor):
        raise no_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; it must be an integer type")
    if labels.ndim != 1 or labels.shape[0] != logits.shape[0]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be ({logits.shape[0]},), one for each row")
    same_device("labels", labels, "logits", logits)
    return labels.long()
