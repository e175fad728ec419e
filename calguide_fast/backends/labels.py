"""The check of labels that reads their values, which backends make where they can do it without a wait."""

from __future__ import annotations

from torch import Tensor


def check_labels(labels: Tensor, num_classes: int) -> None:
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"labels[{row}]={int(labels[row])} is out of range: labels must lie in 0..{num_classes - 1}")
