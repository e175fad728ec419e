"""The demo's pictures: contact sheet, gradient norms, and the frontier of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from calguide_fast.demo.data import CLASSES, IMAGE_SIZE
from calguide_fast.demo.experiment import GradientTrace
from calguide_fast.demo.methods import METHODS

# Okabe & Ito's colours, told apart by every eye, and two greys
_COLORS = ("#000000", "#999999", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00")
_WRONG = "#D62728"


def _style(name: str) -> dict[str, str]:
    """One colour per method; the overconfident twin has that of the method it is a twin of, dashed."""
    names = [method.name for method in METHODS if not method.overconfident]
    base = name.removesuffix("_overconfident")
    return {"color": _COLORS[names.index(base)], "linestyle": "-" if base == name else "--"}


@dataclass(frozen=True)
class SheetRow:
    """One row of the contact sheet."""

    title: str
    detail: str
    figures: str
    images: Tensor  # (10 · per digit, 1, 8, 8): the digits in turn, 0 to 9 and again
    wrong: Tensor  # (10 · per digit,) bool: the judge sees another class


def contact_sheet(rows: Sequence[SheetRow], heading: str, note: str, path: Path) -> None:
    """Write all methods, one below the other, as one picture: digits 0 to 9 across, figures beside them."""
    tile = IMAGE_SIZE + 1
    per_digit = len(rows[0].images) // CLASSES
    block = per_digit * tile + 2  # a wider gap sets the digits apart
    width, height = CLASSES * block, len(rows) * (tile + 2)

    inches = 1 / 16
    left, right, top, bottom = 2.9, 3.1, 1.15, 0.75
    size = (left + width * inches + right, top + height * inches + bottom)
    figure = Figure(figsize=size, dpi=120, facecolor="white")
    axes = figure.add_axes((left / size[0], bottom / size[1], width * inches / size[0], height * inches / size[1]))
    canvas = np.full((height, width), np.nan)
    for r, row in enumerate(rows):
        for i, image in enumerate(row.images[:, 0]):
            y, x = r * (tile + 2), (i % CLASSES) * block + (i // CLASSES) * tile
            canvas[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = image.clamp(-1, 1)
            if row.wrong[i]:
                axes.add_patch(
                    Rectangle((x - 0.75, y - 0.75), tile - 0.5, tile - 0.5, fill=False, edgecolor=_WRONG, linewidth=1.8)
                )
        middle = r * (tile + 2) + IMAGE_SIZE / 2 - 0.5
        axes.text(-3, middle - 1.6, row.title, ha="right", va="center", fontsize=11, fontweight="bold")
        axes.text(-3, middle + 2.4, row.detail, ha="right", va="center", fontsize=8.5, color="#444444")
        axes.text(width + 1, middle, row.figures, ha="left", va="center", fontsize=9.5, family="monospace")
    for digit in range(CLASSES):
        axes.text(digit * block + per_digit * tile / 2 - 1, -3, str(digit), ha="center", fontsize=13, fontweight="bold")
    axes.text(width + 1, -3, " Fréchet  prec. recall class", ha="left", fontsize=9.5, family="monospace")
    axes.imshow(canvas, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    figure.text(0.5, 1 - 0.3 / size[1], heading, ha="center", va="center", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.3 / size[1], note, ha="center", va="center", fontsize=9.5, color="#444444")
    figure.savefig(path)


def gradient_plot(trace: GradientTrace, path: Path) -> None:
    """Write the norms of each term against the step, one panel for each classifier."""
    figure = Figure(figsize=(12, 5.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(trace.norms), sharey=True)
    steps = range(1, len(trace.timesteps) + 1)
    for panel, (classifier, terms) in zip(panels, trace.norms.items(), strict=True):
        for color, (term, values) in zip(_COLORS[2:], terms.items(), strict=False):
            low, middle, high = torch.tensor(values).unbind(1)
            panel.semilogy(steps, middle, color=color, linewidth=2, label=term)
            panel.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        _finish(panel, f"{classifier.capitalize()}", "step, from noise to image", "")
    panels[0].set_ylabel("norm of the image gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=10)
    figure.suptitle(
        "Each term's gradient by itself, at the x̂₀ of one unguided trajectory (median, quartiles shaded)", fontsize=12
    )
    figure.savefig(path)


def frontier_plot(sweep: Mapping[str, Sequence[Mapping[str, float]]], floor: Mapping[str, float], path: Path) -> None:
    """Write where each method goes as its strength grows, from what the sweep measured.

    Args:
        sweep: by method's name, the figures of each strength, weakest first.
        floor: the figures of real digits.
        path: of the picture.
    """
    figure = Figure(figsize=(13, 6.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {method.name: method.title for method in METHODS}
    for name, points in sweep.items():
        style = {**_style(name), "linewidth": 1.6, "marker": "o", "markersize": 4}
        panels[0].plot([p["accuracy"] for p in points], [p["frechet"] for p in points], **style, label=titles[name])
        panels[1].plot([p["recall"] for p in points], [p["precision"] for p in points], **style)
    panels[0].plot(floor["accuracy"], floor["frechet"], "*", color="black", markersize=13, label="Training digits")
    panels[1].plot(floor["recall"], floor["precision"], "*", color="black", markersize=13)
    _finish(panels[0], "Quality against class", "share of the class asked for", "Fréchet distance (lower is better)")
    _finish(panels[1], "Fidelity against diversity", "recall", "precision")
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    figure.suptitle("Every method over its six strengths (a dot each)", fontsize=12)
    figure.savefig(path)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
