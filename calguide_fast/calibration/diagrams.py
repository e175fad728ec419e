"""Pictures of calibration, by matplotlib, which only they need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from calguide_fast.calibration.noise_level import NoiseLevelCalibration
from calguide_fast.calibration.predictions import top_label
from calguide_fast.calibration.reliability import ArrayLike, ReliabilityCurve, reliability_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by every eye
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#777777"


def reliability_diagram(
    confidence: ArrayLike | ReliabilityCurve,
    correct: ArrayLike | None = None,
    *,
    path: str | Path | None = None,
    axes: Axes | None = None,
    title: str | None = None,
    color: str = _COLORS[0],
    **settings: Any,
) -> Figure:
    """Draw the reliability curve: accuracy over confidence, as wide as there are samples, with its bootstrap band.

    At confidence t the curve is at t + the smoothed gap between accuracy and confidence, which near 0 and 1 may lie
    outside them. Above the diagonal a classifier is less sure than it is right, below it is overconfident; the distance
    from the diagonal, weighted by the density, is the smooth ECE. The shading at the bottom is that density; the cross
    marks the mean confidence and the accuracy.

    Args:
        confidence: (n,) in 0..1, or a :class:`ReliabilityCurve` that is already there.
        correct: (n,) bool or numbers 0 and 1.
        path: of a picture to write; the suffix chooses the format.
        axes: draw here, and not into a figure of its own.
        title: a first line above the smooth ECE's.
        color: of the curve.
        **settings: of :func:`reliability_curve`.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as :func:`reliability_curve`.
    """
    if isinstance(confidence, ReliabilityCurve):
        if correct is not None or settings:
            raise TypeError("a ReliabilityCurve holds all there is to draw: give no outcomes and no settings with it")
        curve = confidence
    elif correct is None:
        raise TypeError("correct must be given with confidence: (n,) outcomes")
    else:
        curve = reliability_curve(confidence, correct, **settings)
    figure, axes = _axes(axes, (5.2, 5.6))
    _draw_reliability(axes, curve, color)
    lines = [f"smECE {curve.smooth_ece:.4f} at bandwidth {curve.bandwidth:.4f}, n = {curve.samples:,}"]
    lines.append(f"accuracy {curve.mean_accuracy:.1%}, mean confidence {curve.mean_confidence:.1%}")
    axes.set_title("\n".join([title, *lines] if title else lines), fontsize=10)
    if path is not None:
        figure.savefig(path)
    return figure


def calibration_diagram(
    before: Tensor, after: Tensor, labels: Tensor, name: str, *, path: str | Path | None = None
) -> Figure:
    """Draw the reliability curves of logits (n, num_classes) before and after calibration, side by side.

    Args:
        before: the classifier's logits.
        after: the calibrated ones, of the same samples.
        labels: (n,) integers.
        name: of the calibration, for the title.
        path: of a picture to write; the suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as :func:`reliability_curve`.
    """
    figure = _figure((10.4, 5.6))
    for axes, logits, title in zip(figure.subplots(1, 2), (before, after), ("before", f"after {name} scaling")):
        reliability_diagram(*top_label(logits, labels), axes=axes, title=title)
    if path is not None:
        figure.savefig(path)
    return figure


def _draw_reliability(axes: Axes, curve: ReliabilityCurve, color: str) -> None:
    from matplotlib.collections import LineCollection

    t, confidence, accuracy, low, high, density = (part.numpy() for part in curve[:6])
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")
    # a fifth of the height for the highest density
    axes.fill_between(t, 0, 0.2 * density / density.max(), color=_GREY, alpha=0.25, linewidth=0)
    axes.plot([0, 1], [0, 1], linestyle="--", color=_GREY, linewidth=1)
    gap = accuracy - confidence
    axes.fill_between(t, (t + low).clip(0, 1), (t + high).clip(0, 1), color=color, alpha=0.18, linewidth=0)
    points = np.stack([t, t + gap], 1)
    pieces = np.stack([points[:-1], points[1:]], 1)
    seen = ~np.isnan(pieces).any((1, 2))
    # the root keeps a line visible where samples are few
    widths = 0.8 + 3.5 * np.sqrt(density / density.max())
    axes.add_collection(
        LineCollection(list(pieces[seen]), linewidths=widths[:-1][seen], colors=color, capstyle="round")
    )
    axes.plot(curve.mean_confidence, curve.mean_accuracy, "x", color="black", markersize=8, markeredgewidth=2)
    axes.set_xlabel("confidence in the top label")
    axes.set_ylabel("accuracy")
    _finish(axes)


def noise_level_diagram(
    found: NoiseLevelCalibration | Mapping[str, NoiseLevelCalibration], *, path: str | Path | None = None
) -> Figure:
    """Draw smooth ECE, and accuracy and mean confidence, over the noise level σ.

    Args:
        found: what :func:`calibration_by_noise_level` gave, or several by name.
        path: of a picture to write; the suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    by_name = {"": found} if isinstance(found, NoiseLevelCalibration) else dict(found)
    if not by_name:
        raise ValueError("found holds no calibration to draw")
    figure = _figure((11, 4.4))
    panels = figure.subplots(1, 2)
    for index, (name, levels) in enumerate(by_name.items()):
        color = _COLORS[index % len(_COLORS)]
        label = f"{name}: " if name else ""
        panels[0].plot(levels.sigmas, levels.smooth_ece, color=color, linewidth=2, marker="o", markersize=3, label=name)
        panels[1].plot(levels.sigmas, levels.confidence, color=color, linewidth=2, label=f"{label}mean confidence")
        panels[1].plot(
            levels.sigmas, levels.accuracy, color=color, linewidth=2, linestyle="--", label=f"{label}accuracy"
        )
    panels[0].set(title="Smooth ECE", ylim=(0, None))
    panels[1].set(title="Confidence and accuracy", ylim=(0, 1.02))
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("noise level σ (noise per unit of signal)")
        _finish(panel)
    if "" not in by_name:
        panels[0].legend(fontsize=9)
    panels[1].legend(fontsize=9)
    if path is not None:
        figure.savefig(path)
    return figure


def _axes(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if axes is not None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        return figure, axes
    figure = _figure(size)
    return figure, figure.subplots()


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "diagrams need matplotlib, which a plain install leaves out: pip install 'calguide_fast[demo]' "
            "(or '.[demo]' in the source folder)"
        ) from error
    return Figure(figsize=size, dpi=120, layout="constrained")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
