"""How records of tensors print: shapes in place of numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor


def summary(record: Any) -> str:
    """The representation of a dataclass, of each tensor the shape alone."""
    shown = (
        f"{field.name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
        for field in fields(record)
        for value in [getattr(record, field.name)]
    )
    return f"{type(record).__name__}({', '.join(shown)})"
