"""The rows of the published table of ImageNet 128×128, and what each is sampled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calguide_fast.generation.job import Job
from calguide_fast.generation.options import options_of
from calguide_fast.studies.series import Point

PRESET = "imagenet128"
ADM, ELUCD, PAPER = "arXiv 2105.05233", "arXiv 2310.11311", "arXiv 2511.05844"


@dataclass(frozen=True)
class Row:
    """One row of the table, of 50,000 images in 250 DDPM steps.

    Attributes:
        title: of it.
        source: who published the figures.
        published: ``fid`` and, where they are given, ``precision`` and ``recall``.
        recipe: of `RECIPES`.
        classifier: what guides, by its name in `models.specs.CLASSIFIERS`; None without guidance.
        divergence: added to the recipe. The published alpha, epsilon and scale of these rows are not known.
    """

    title: str
    source: str
    published: Mapping[str, float]
    recipe: str
    classifier: str | None = None
    divergence: str | None = None


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "unguided": Row("ADM, unguided", ADM, {"fid": 5.91, "precision": 0.70, "recall": 0.65}, "unguided"),
        "adm-g": Row("ADM-G", ADM, {"fid": 2.97, "precision": 0.78, "recall": 0.59}, "adm-g", PRESET),
        "elucd-r50": Row(
            "EluCD, ResNet-50", ELUCD, {"fid": 2.36, "precision": 0.77, "recall": 0.60}, "elucd", "resnet50"
        ),
        "elucd-r101": Row(
            "EluCD, ResNet-101", ELUCD, {"fid": 2.19, "precision": 0.79, "recall": 0.58}, "elucd", "resnet101"
        ),
        "forward-kl": Row("Forward KL, ResNet-101", PAPER, {"fid": 2.17}, "ours", "resnet101", "forward_kl"),
        "reverse-kl": Row("Reverse KL, ResNet-101", PAPER, {"fid": 2.14}, "ours", "resnet101", "reverse_kl"),
        "js": Row("Jensen–Shannon, ResNet-101", PAPER, {"fid": 2.13}, "ours", "resnet101", "js"),
    }
)


def row_points(
    names: Sequence[str], files: Mapping[str, Path], divergence: Mapping[str, float | None], given: Mapping[str, Any]
) -> list[Point]:
    """The rows as jobs.

    Args:
        names: of :data:`ROWS`.
        files: the weights of ``unet`` and of each classifier; they are not read here.
        divergence: ``alpha``, ``epsilon`` and ``scale`` of the rows that have a divergence; None for the recipe's.
        given: other options of ``sample``, the same for all rows.

    Raises:
        ValueError, TypeError: an unknown row, or a setting out of its range.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"rows={','.join(names)!r} must be different ones of {', '.join(ROWS)}")
    return [_point(name, ROWS[name], files, divergence, given) for name in names]


def _point(
    name: str, row: Row, files: Mapping[str, Path], divergence: Mapping[str, float | None], given: Mapping[str, Any]
) -> Point:
    options = {**given, "unet": files["unet"], "recipe": row.recipe, "grid": 100, "png": False}
    if row.classifier is not None:
        options["classifier"] = [f"{row.classifier}:{files[row.classifier]}"]
    if row.divergence is not None:
        options |= {"divergence": row.divergence, **divergence}
    job = Job.of(options_of(PRESET, Path(), options))
    columns: dict[str, Any] = {"row": name, "recipe": row.recipe, "classifier": row.classifier}
    if job.guidance is not None:
        columns["scale"] = job.guidance.scale
        if row.divergence is not None:
            columns |= {"alpha": job.guidance.alpha, "epsilon": job.guidance.epsilon}
    return Point(name, columns, job)


def architectures(names: Sequence[str]) -> list[str]:
    """The classifiers that some rows need, each once."""
    return list(dict.fromkeys(c for name in names if (c := ROWS[name].classifier) is not None))
