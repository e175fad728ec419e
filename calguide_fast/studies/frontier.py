"""The frontier of a sweep: what a Fréchet distance costs in class accuracy, and in recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

# Okabe & Ito's colours, told apart by every eye
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00")
MARKERS = "osD^vPX*"
# where a point's strength stands, so that those of points that coincide do not
OFFSETS = ((5, 4), (5, -9), (-16, 4), (-16, -9))
# of the alphas and epsilons of one divergence
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
NAMES = {"none": "log p alone", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "js": "Jensen–Shannon"}
FEW = 40  # points that can all bear their strengths


def frontier_plot(rows: Sequence[Mapping[str, Any]], heading: str, file: BinaryIO) -> None:
    """Write the Fréchet distance against class accuracy and against recall, as a PNG.

    A line for each divergence with one alpha and epsilon, its points in the order of their strengths.

    Args:
        rows: ``divergence``, ``alpha``, ``epsilon``, their :func:`strength_of`, ``fid`` and one
            :func:`frontier_panels` at least.
        heading: above the panels.
        file: to write to.
    """
    panels, strength = frontier_panels(rows), strength_of(rows[0])
    figure = Figure(figsize=(1.2 + 6 * len(panels), 6.4), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, name in zip(all_axes, panels):
        for number, (style, points) in enumerate(_lines(rows)):
            axes.plot([p[name] for p in points], [p["fid"] for p in points], **style)
            for point in points if len(rows) <= FEW else ():
                axes.annotate(
                    f"{point[strength]:g}",
                    (point[name], point["fid"]),
                    xytext=OFFSETS[number % len(OFFSETS)],
                    textcoords="offset points",
                    fontsize=7,
                    color=style["color"],
                )
        axes.set_xlabel("share of the class asked for" if name == "accuracy" else "recall")
        _finish(axes)
    _scale(all_axes[0], [row["fid"] for row in rows])
    all_axes[0].set_ylabel("Fréchet distance (lower is better)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(heading, fontsize=11)
    figure.savefig(file, format="png")


def frontier_panels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the Fréchet distance can be drawn against: of ``accuracy`` and ``recall`` those that were measured."""
    return [name for name in ("accuracy", "recall") if all(name in row for row in rows)]


def strength_of(row: Mapping[str, Any]) -> str:
    """The column that says how strong guidance is."""
    return "scale" if "scale" in row else "max_guidance"


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """The style and the points, weakest first, of each line."""
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["divergence"], row["alpha"], row["epsilon"]), []).append(row)
    divergences = list(dict.fromkeys(divergence for divergence, _, _ in lines))
    found = []
    for line, points in lines.items():
        divergence, alpha, epsilon = line
        kin = [other for other in lines if other[0] == divergence]
        index = divergences.index(divergence)
        label = NAMES.get(divergence, divergence)
        style = {
            "label": label if alpha is None else f"{label}, α={alpha:g}, ε={epsilon:g}",
            "color": COLORS[index % len(COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[kin.index(line) % len(DASHES)],
            "linewidth": 1.5,
            "markersize": 5,
            "markerfacecolor": "none",
        }
        found.append((style, sorted(points, key=lambda row: row[strength_of(row)])))
    return found


def _scale(axes: Axes, distances: Sequence[float]) -> None:
    # too strong a guidance soon leaves every linear scale
    if min(distances) <= 0 or max(distances) < 4 * min(distances):
        return
    axes.set_yscale("log")
    ticks = [m * 10**e for e in range(-4, 6) for m in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
