"""Predictions in files: .npz and .csv tables of confidences or logits and what was right."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calguide_fast.calibration.predictions import top_label
from calguide_fast.npz import array_names, read_array

LOGITS = ("logits", "logit")
PROBABILITIES = ("probabilities", "probs", "prob")
CONFIDENCES = ("confidences", "confidence")
LABELS = ("labels", "label", "targets", "target", "y")
CORRECT = ("correct",)

ACCEPTED = (
    "logits (n, C) or probabilities (n, C) with labels (n,), or confidences (n,) with correct (n,) of 0 and 1: "
    "the names of an .npz file's arrays or a .csv file's columns, there logits_0, logits_1, … for the classes. "
    f"Other names: {', '.join((*LOGITS[1:], *PROBABILITIES[1:], *CONFIDENCES[1:], *LABELS[1:]))}."
)


class Predictions(NamedTuple):
    """What a file holds, on the CPU."""

    confidence: Tensor  # (n,) float32 or float64
    correct: Tensor  # (n,)
    logits: Tensor | None  # (n, C); log-probabilities of probabilities
    labels: Tensor | None  # (n,) int64, where there are logits


def read_predictions(path: str | Path) -> Predictions:
    """Read predictions from an .npz or a .csv file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or one that lacks what :data:`ACCEPTED` names or holds it in another shape.
    """
    path = Path(path)
    tables = _tables(path)

    def find(names: tuple[str, ...], dimensions: int) -> Tensor | None:
        name = next((name for name in names if name in tables), None)
        return None if name is None else _numbers(path, name, tables[name], dimensions)

    logits, probabilities = find(LOGITS, 2), find(PROBABILITIES, 2)
    confidence, correct, labels = find(CONFIDENCES, 1), find(CORRECT, 1), find(LABELS, 1)
    if logits is None and probabilities is not None:
        logits = _logs(path, probabilities)
    if logits is not None and labels is not None:
        if (labels != labels.round()).any():
            raise ValueError(f"{path}: labels must be whole numbers")
        labels = labels.long()
        return Predictions(*top_label(logits, labels), logits, labels)
    if confidence is not None and correct is not None:
        return Predictions(confidence, correct, None, None)
    raise ValueError(f"{path} holds {', '.join(tables) or 'nothing'}; a file must hold {ACCEPTED}")


def _tables(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in (".npz", ".csv"):
        raise ValueError(f"{path} must be an .npz or a .csv file")
    if path.suffix == ".csv":
        return _columns(path)
    return {name: read_array(path, name) for name in array_names(path)}


def _columns(path: Path) -> dict[str, np.ndarray]:
    """Columns by name; name_0, name_1, … become one table (n, C)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError(f"{path} must hold a line of column names and at least one line of numbers")
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: {len(row)} values for {len(names)} columns")
    columns = dict(zip(names, np.array(rows[1:]).T))
    tables: dict[str, np.ndarray] = {}
    numbered: dict[str, dict[int, np.ndarray]] = {}
    for name, column in columns.items():
        match = re.fullmatch(r"(.+)_(\d+)", name)
        if match:
            numbered.setdefault(match[1], {})[int(match[2])] = column
        else:
            tables[name] = column
    for name, classes in numbered.items():
        if sorted(classes) != list(range(len(classes))):
            raise ValueError(f"{path}: columns {name}_… must be numbered 0, 1, 2, … without a gap")
        tables[name] = np.stack([classes[index] for index in range(len(classes))], 1)
    return tables


_WORDS = {"true": "1", "false": "0"}


def _numbers(path: Path, name: str, values: np.ndarray, dimensions: int) -> Tensor:
    if values.ndim != dimensions or 0 in values.shape:
        shape = "(n, C)" if dimensions == 2 else "(n,)"
        raise ValueError(f"{path}: {name} has shape {values.shape}; it must be {shape}, neither of them 0")
    if values.dtype.kind == "U":
        try:
            values = np.reshape([float(_WORDS.get(v, v)) for v in np.char.lower(values).flat], values.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {name} must be numbers: {error}") from None
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{path}: {name} has dtype {values.dtype}; it must be numbers")
    return torch.from_numpy(values.astype(np.float32 if values.dtype == np.float32 else np.float64))


def _logs(path: Path, p: Tensor) -> Tensor:
    if not ((p >= 0) & (p <= 1)).all() or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3):
        raise ValueError(f"{path}: probabilities must lie in 0..1, with rows that sum to 1")
    return p.log()
