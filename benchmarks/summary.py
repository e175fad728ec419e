"""The few rows of a kept run that the README shows.

    python benchmarks/summary.py benchmarks/results/NAME.json

writes them into README.md, between the lines <!-- benchmarks: NAME --> and <!-- end of benchmarks -->.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import Row, against, by, is_aimed, is_missed, number, table

README = Path(__file__).parents[1] / "README.md"

# of groups whose names fit, which peers are shown
GUIDANCE = (
    r"guidance reverse_kl (8x10|64x1000|64x21843)|guidance forward_kl 256x1000|guidance js (64x1000|64x21843)"
    r"|guidance \w+ \d+x\d+ \(cuda\)",
    ["eager closed form", "eager autograd", "eager reduced", "torch.compile", "torch.compile, reduced", "Liger-Kernel"],
)
STEP = (
    r"guided_step 64x1x16x16, noise given, out=|guided_step 16x3x128x128, .*|predict_x0 16x3x128x128, out="
    r"|tilt_weights 256|top_label 50000x1000|guided_step .* \(cuda\)",
    ["eager", "torch.compile"],
)
SMOOTH_ECE = (r"smooth_ece \d+( \(cuda\))?", ["relplot", "torchmetrics, bins", "15 bins", "with its gradient"])
# the options that gain the most
OPTIONS = r"sampling (adm64: .*, bf16, channels_last|few digits: .*, torch.compile)"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a kept run's few figures into README.md.")
    parser.add_argument("run", type=Path, help="benchmarks/results/NAME.json")
    run = parser.parse_args().run
    README.write_text(placed(README.read_text(), run.stem, summary(json.loads(run.read_text()))))


def placed(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with these lines between the two that mark the place of the run of that name."""
    begin, end = f"<!-- benchmarks: {name} -->\n", "<!-- end of benchmarks -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"README.md has no place for the run: lines {begin.strip()!r} and {end!r}")
    return "\n".join([before + begin, *lines, "", end + rest.partition(end)[2]])


def summary(run: Mapping[str, Any]) -> list[str]:
    """The lines of Markdown."""
    machine, rows = run["machine"], run["rows"]
    ops = [row for row in rows if "ratio" in row and "table" not in row]
    device = machine["processor"] if machine["device"] == "CPU" else machine["device"]
    lines = [f"{device}, {machine['threads']} thread(s), torch {machine['torch']}, {run['date']}:", ""]
    # the value alone and with its gradient are of a group of their own
    ops = [{**row, "group": row["group"].replace(", value", "")} for row in ops]
    for pattern, peers in (GUIDANCE, STEP, SMOOTH_ECE):
        lines += [*_ops(ops, pattern, peers), ""]
    sampling = [row for row in rows if row.get("table") == "sampling"]
    options = [row for row in rows if row.get("table") == "options" and re.fullmatch(OPTIONS, row["group"])]
    if sampling:
        lines += [*_sampling(sampling, options), ""]
    aimed = [row for row in ops if is_aimed(row)]
    reached = sum(not is_missed(row) for row in aimed)
    return [*lines, f"Of {len(aimed)} ratios that were aimed at, {reached} were reached."]


def _ops(rows: Sequence[Row], pattern: str, peers: Sequence[str]) -> list[str]:
    """A table of the groups that fit: ours, and each peer that any of them has."""
    found = [row for row in rows if re.fullmatch(pattern, row["group"])]
    peers = [peer for peer in peers if any(row["peer"] == peer for row in found)]
    on_gpu = any(row.get("graph_ours_us") is not None for row in found)
    body = []
    for group, members in by(found, lambda row: row["group"]).items():
        of = {row["peer"]: row for row in members}
        gpu = [_median(members, "graph_ours_us"), _median(members, "share_of_copy", "{:.0%}")] if on_gpu else []
        cells = [against(of.get(peer), memory=False) for peer in peers]
        body.append([f"`{group}`", _median(members, "ours_us"), *gpu, *cells])
    return table(["µs", "ours", *(["in a graph", "of a copy's bandwidth"] if on_gpu else []), *peers], body)


def _median(rows: Sequence[Row], key: str, form: str = "") -> str:
    found = [row[key] for row in rows if row.get(key) is not None]
    if not found:
        return "–"
    return form.format(median(found)) if form else number(median(found))


def _sampling(sampling: Sequence[Row], options: Sequence[Row]) -> list[str]:
    """Whole sampling against the eager loop, and what the options gain over ours without them."""
    body = [
        [
            row["group"].removeprefix("sampling "),
            number(row["peer_us"] * row["per_step"] / 1e3),
            number(row["ours_us"] * row["per_step"] / 1e3),
            f"{row['ratio']:.2f}×",
            number(row.get("difference")),
        ]
        for row in [*sampling, *options]
    ]
    return table(["ms a step of whole sampling", "before", "ours", "gain", "largest difference in a pixel"], body)


if __name__ == "__main__":
    main()
