"""The charts of a run of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

Row = Mapping[str, Any]

# Okabe & Ito's colours, told apart by every eye
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A6D00", "#999999", "#000000")


def draw(rows: Sequence[Row], folder: Path, name: str) -> dict[str, str]:
    """Write the charts that the rows allow; gives each one's file name by its key."""
    wanted = {
        "ratios": (_ratios, [row for row in rows if "ratio" in row and "table" not in row and row["same_result"]]),
        "roofline": (_roofline, [row for row in rows if row.get("gb_per_s") and row.get("copy_gb_per_s")]),
        "parts": (_parts, [row for row in rows if row.get("table") == "parts"]),
        "growth": (_growth, [row for row in rows if row.get("table") == "growth"]),
    }
    files = {}
    for key, (chart, found) in wanted.items():
        if found:
            files[key] = f"{name}-{key}.png"
            chart(found).savefig(folder / files[key], dpi=110, bbox_inches="tight")
    return files


def _ratios(rows: Sequence[Row]) -> Figure:
    """A dot for each peer on the line of each group; 1 is ours."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + len(groups) / 4.2), facecolor="white")
    axes = figure.subplots()
    for peer, color in zip(peers, _colors(len(peers))):
        found = [row for row in rows if row["peer"] == peer]
        places = [groups.index(row["group"]) for row in found]
        axes.scatter([row["ratio"] for row in found], places, s=34, color=color, label=peer, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("times as long as ours takes (1: ours)")
    axes.grid(axis="x", which="both", color="#DDDDDD", linewidth=0.6)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.9 / (1 + len(groups) / 4.2)), ncols=4, fontsize=8)
    return figure


def _roofline(rows: Sequence[Row]) -> Figure:
    """Bytes per second of each op over the bytes it moves, under those of a copy in the same run."""
    figure = Figure(figsize=(8, 5), facecolor="white")
    axes = figure.subplots()
    # a copy's size is the next power of two
    ceiling = {1 << (row["bytes"] - 1).bit_length(): row["copy_gb_per_s"] for row in rows}
    axes.plot(*zip(*sorted(ceiling.items())), color="black", linewidth=1.5, marker="_", label="copy_ in this run")
    families = list(dict.fromkeys(row["group"].split()[0].rstrip(",") for row in rows))
    for family, color in zip(families, _colors(len(families))):
        found: dict[str, list[Row]] = {}
        for row in rows:
            if row["group"].split()[0].rstrip(",") == family:
                found.setdefault(row["group"], []).append(row)
        points = [(each[0]["bytes"], median(row["gb_per_s"] for row in each)) for each in found.values()]
        axes.scatter(*zip(*points), s=40, color=color, label=family, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = min(ceiling), max(ceiling)
    ticks = [size for size in (1 << k for k in range(10, 40, 2)) if low / 4 <= size <= high * 2]
    axes.set_xticks(ticks, [_bytes(size) for size in ticks])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.set_xlabel("bytes read and written by a call")
    axes.set_ylabel("GB/s")
    axes.grid(which="both", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"


def _parts(rows: Sequence[Row]) -> Figure:
    """Each step as a bar of its parts, all in percent of the eager loop's step."""
    figure = Figure(figsize=(9, 1.4 + 0.8 * len(rows)), facecolor="white")
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for row in rows for part in row["parts_us"]))
    colors = dict(zip(parts, _colors(len(parts))))
    for place, row in enumerate(rows):
        left = 0.0
        found = row["parts_us"] | {"rest": max(0.0, row["step_us"] - sum(row["parts_us"].values()))}
        for part, time in found.items():
            width = 100 * time / row["eager_step_us"]
            color = colors.get(part, "#CCCCCC")
            axes.barh(place, width, 0.55, left, color=color, label=part if place == 0 else None)
            left += width
        text = f"our ops {row['share_of_ours']:.1%} of {row['step_us'] / 1e3:.3g} ms"
        axes.text(max(left, 100) + 1, place, text, va="center", fontsize=8)
    axes.axvline(100, color="black", linewidth=1)
    names = [row["group"].removeprefix("sampling ").removesuffix(", parts") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("% of the eager loop's step (line)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.7 / (0.6 + 0.8 * len(rows))), ncols=4, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _growth(rows: Sequence[Row]) -> Figure:
    """Time over work, both relative to the largest size; the dashed line is growth as the work's."""
    columns = 4
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * height), facecolor="white", layout="constrained")
    panels: Sequence[Axes] = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows):
        axes.loglog(row["sizes"], row["us"], marker="o", markersize=4, color=COLORS[0])
        last = row["us"][-1]
        line = [last * work / row["work"][-1] for work in row["work"]]
        axes.loglog(row["sizes"], line, "--", color="#999999", linewidth=1)
        axes.set_ylim(min(row["us"]) / 2, last * 2)
        axes.set_title(row["group"].removeprefix("growth "), fontsize=9)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    figure.supylabel("µs a call; dashed: as its work grows", fontsize=9)
    return figure


def _colors(count: int) -> Sequence[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]
