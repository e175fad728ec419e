"""The demo's pictures: sheets of digits, gradient norms, and the frontier of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from calguide_fast.calibration import measure_calibration, reliability_diagram, top_label
from calguide_fast.demo.calibration import ARMS, TRACED, Study
from calguide_fast.demo.data import IMAGE_SIZE
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
    """One row of a sheet of digits."""

    title: str
    detail: str
    figures: Sequence[str]
    images: Tensor  # (columns · depth, 1, 8, 8): one for each column, then the second of each, …
    wrong: Tensor  # (columns · depth,) bool: the judge sees another class


def sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    figures: Sequence[str],
    heading: str,
    note: str,
    path: Path,
) -> None:
    """Write rows of digits as one picture: titles on the left, figures on the right, wrong digits framed."""
    tile, row_height = IMAGE_SIZE + 1, IMAGE_SIZE + 2.6
    depth = len(rows[0].images) // len(columns)
    column_width = depth * tile + 2  # a wider gap sets the columns apart
    width, height = len(columns) * column_width - 2, len(rows) * row_height

    # all lengths are in pixels of a digit, of which an inch holds 14
    left, right, top, bottom = 49, 15 * len(figures) + 4, 16, 10
    size = ((left + width + right) / 14, (top + height + bottom) / 14)
    figure = Figure(figsize=size, dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-left, width + right), ylim=(height + bottom, -top))
    axes.set_axis_off()
    for r, row in enumerate(rows):
        y = r * row_height
        for i, image in enumerate(row.images[:, 0]):
            x = i % len(columns) * column_width + i // len(columns) * tile
            extent = (x, x + IMAGE_SIZE, y + IMAGE_SIZE, y)
            axes.imshow(image.numpy(), "gray", vmin=-1, vmax=1, interpolation="nearest", extent=extent, aspect="auto")
            if row.wrong[i]:
                axes.add_patch(Rectangle((x, y), IMAGE_SIZE, IMAGE_SIZE, fill=False, edgecolor=_WRONG, linewidth=3))
        axes.text(-2, y + 2.6, row.title, ha="right", va="center", fontsize=13.5, fontweight="bold")
        axes.text(-2, y + 6.2, row.detail, ha="right", va="center", fontsize=10.5, color="#444444")
        for f, text in enumerate(row.figures):
            axes.text(width + 15 * (f + 1), y + 4, text, ha="right", va="center", fontsize=13)
    for c, text in enumerate(columns):
        middle = c * column_width + (depth * tile - 1) / 2
        axes.text(middle, -1.5, text, ha="center", va="bottom", fontsize=15, fontweight="bold")
    for f, text in enumerate(figures):
        axes.text(width + 15 * (f + 1), -1.5, text, ha="right", va="bottom", fontsize=12, fontweight="bold")
    axes.text((width + right - left) / 2, -11, heading, ha="center", va="center", fontsize=18, fontweight="bold")
    axes.text((width + right - left) / 2, height + 4, note, ha="center", va="center", fontsize=12, color="#444444")
    # imshow fits the axes to its last picture
    axes.set(xlim=(-left, width + right), ylim=(height + bottom, -top))
    figure.savefig(path)


def gradient_plot(trace: GradientTrace, path: Path) -> None:
    """Write the norms of each term against the step, one panel for each classifier."""
    figure = Figure(figsize=(12, 5.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(trace.norms), sharey=True)
    steps = range(1, len(trace.timesteps) + 1)
    for panel, (classifier, terms) in zip(panels, trace.norms.items(), strict=True):
        for color, (term, values) in zip(_COLORS[2:], terms.items(), strict=False):
            panel.semilogy(steps, [median for _, median, _ in values], color=color, linewidth=2, label=term)
        _finish(panel, classifier.capitalize(), "step, from noise to image", "")
    panels[0].set_ylabel("norm of the image gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=10)
    figure.suptitle(
        "Each term's gradient by itself, where an unguided sampler passes through (median over images)", fontsize=12
    )
    figure.savefig(path)


def calibration_panels(study: Study, labels: Tensor, path: Path) -> None:
    """Write the reliability diagram of every arm's first classifier, and how its guidance fades along the path.

    Args:
        study: whose logits (n, 10) are drawn.
        labels: (n,) of the test digits.
        path: of the picture.
    """
    figure = Figure(figsize=(15, 11), dpi=100, layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    measured = {arm: measure_calibration(logits, labels) for arm, logits in study.logits.items()}
    # smoothed alike: at its own bandwidth the better calibrated would look the rougher
    bandwidth = max(each.bandwidth for each in measured.values())
    for color, panel, (arm, title) in zip(_COLORS[2:], panels, ARMS.items()):
        reliability_diagram(*top_label(study.logits[arm], labels), axes=panel, color=color, bandwidth=bandwidth)
        smooth_ece, accuracy, confidence = measured[arm].smooth_ece, measured[arm].accuracy, measured[arm].confidence
        figures = f"smECE {smooth_ece:.3f}, accuracy {accuracy:.1%}, mean confidence {confidence:.1%}"
        panel.set_title(f"{title}\n{figures}", fontsize=11)
        medians = [median for _, median, _ in study.trace.norms[title][TRACED]]
        last.semilogy(range(1, len(medians) + 1), medians, color=color, linewidth=2, label=title)
    _finish(last, f"What is left of the gradient of {TRACED}", "step, from noise to image", "norm (median over images)")
    last.margins(y=0.25)  # where the legend goes
    last.legend(fontsize=9, loc="upper right")
    figure.suptitle(
        f"One overconfident classifier and its repairs: reliability on {len(labels)} test digits (smoothed alike, "
        f"σ = {bandwidth:.3f}), and the gradient where an unguided sampler passes",
        fontsize=13,
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
        # beyond a method's best, too strong a guidance soon leaves every scale
        limit = 3 * min(point["frechet"] for point in points)
        points = [point for point in points if point["frechet"] <= limit]
        style = {**_style(name), "linewidth": 1.6, "marker": "o", "markersize": 4}
        panels[0].plot([p["accuracy"] for p in points], [p["frechet"] for p in points], **style, label=titles[name])
        panels[1].plot([p["recall"] for p in points], [p["precision"] for p in points], **style)
    panels[0].plot(floor["accuracy"], floor["frechet"], "*", color="black", markersize=13, label="Training digits")
    panels[1].plot(floor["recall"], floor["precision"], "*", color="black", markersize=13)
    _finish(panels[0], "Quality against class", "share of the class asked for", "Fréchet distance (lower is better)")
    _finish(panels[1], "Fidelity against diversity", "recall", "precision")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(ScalarFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    figure.suptitle(
        "Every method over its strengths, a dot each, as far as three times its lowest Fréchet distance", fontsize=12
    )
    figure.savefig(path)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
