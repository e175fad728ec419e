"""A saved run of the benchmarks as a page: tables and charts, with what they were measured on.

    python -m pytest benchmarks --benchmark-only --benchmark-json=run.json
    python benchmarks/report.py run.json [--name NAME] [--out FOLDER]

writes NAME.json (the run without what nobody reads), NAME.md and NAME-*.png into the folder.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import charts
from aims import cause_of

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]

TITLES = {
    "guidance": "Guidance gradient",
    "guided_step": "Guided step",
    "predict_x0": "Clean image",
    "tilt_weights": "Tilt weights",
    "sampling_noise": "Noise",
    "smooth_ece": "Smooth ECE",
    "top_label": "Top label",
    "smooth_ece_from_logits": "Smooth ECE of logits",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a saved run of the benchmarks into a page.")
    parser.add_argument("run", type=Path, help="what pytest wrote to --benchmark-json")
    parser.add_argument("--name", help="of the files (default: from the device and the threads)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default: benchmarks/results)")
    arguments = parser.parse_args()
    run = condensed(json.loads(arguments.run.read_text()))
    print(write(run, arguments.out, arguments.name or default_name(run["machine"])))


def condensed(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a run that pytest-benchmark saved; of one that is condensed already, the same."""
    if "machine" in run:
        return dict(run)
    info = run["machine_info"]
    # an emulated or shared processor may not tell its name
    processor = info.get("cpu", {}).get("brand_raw") or info.get("processor") or info.get("machine")
    kept = ("device", "threads", "torch", "backends", "python_version", "system", "machine")
    commit = run.get("commit_info", {})
    return {
        "machine": {"processor": processor} | {key: info[key] for key in kept if key in info},
        "commit": {key: commit.get(key) for key in ("id", "dirty")},
        "date": run["datetime"][:10],
        "not_measured": run.get("not_measured", []),
        "rows": [{"group": row["group"], **_rounded(row["extra_info"])} for row in run["benchmarks"]],
    }


def _rounded(value: Any) -> Any:
    """Six digits, which is more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def default_name(machine: Mapping[str, Any]) -> str:
    device = machine["processor"] if machine["device"] == "CPU" else machine["device"]
    threads = f" {machine['threads']} threads" if machine["device"] == "CPU" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{device}{threads}".lower()).strip("-")


def write(run: Mapping[str, Any], folder: Path, name: str) -> Path:
    """The run, its page and its charts; gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    pictures = charts.draw(run["rows"], folder, name)
    path = folder / f"{name}.md"
    path.write_text(page(run, pictures))
    return path


def page(run: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The Markdown page; ``pictures`` gives the file of each chart that there is."""
    rows = run["rows"]

    def picture(key: str, title: str) -> list[str]:
        return [f"![{title}]({pictures[key]})", ""] if key in pictures else []

    ops = [row for row in rows if "ratio" in row and "table" not in row]
    lines = [*_heading(run), *picture("ratios", "How many times as long each alternative takes"), *_op_tables(ops)]
    lines += [*_floors(ops), *picture("roofline", "Bytes per second against a copy's")]
    for key, title, table in (
        ("sampling", "Whole sampling", _sampling),
        ("options", "Options of the sampler", _options),
        ("parts", "Where a guided step's time goes", _parts),
        ("threads", "Two threads", _threads),
        ("growth", "Growth", _growth),
    ):
        found = [row for row in rows if row.get("table") == key]
        if found:
            lines += [f"## {title}", "", *table(found), "", *picture(key, title)]
    return "\n".join(lines).rstrip() + "\n"


def _heading(run: Mapping[str, Any]) -> list[str]:
    machine, commit = run["machine"], run["commit"]
    changed = ", with changes that are not committed" if commit.get("dirty") else ""
    lines = [
        f"# Benchmarks on {machine['processor'] if machine['device'] == 'CPU' else machine['device']}",
        "",
        f"{run['date']}, commit {(commit.get('id') or 'unknown')[:12]}{changed}; {machine['threads']} thread(s), "
        f"Python {machine.get('python_version', '?')}, torch {machine['torch']}. Backends: "
        + "; ".join(f"{name} ({detail})" for name, detail in machine.get("backends", {}).items())
        + ".",
        "",
        "Times are medians in µs; in brackets how many times ours the alternative takes, both timed in turn in blocks "
        "of calls. Every result was compared with float64 first; *in italics* what does another job, for scale. "
        "*Copy*: the share of the bytes per second that `copy_` of as many bytes reaches. *Host*: what is spent around "
        "the kernel. *Memory*: the most that PyTorch's allocator gave out during a call beyond its inputs (scratch "
        "that a compiled kernel or NumPy takes by itself is not seen). A dash: not measured.",
        "",
    ]
    if run["not_measured"]:
        lines += ["Not measured here:", "", *(f"- {reason}" for reason in run["not_measured"]), ""]
    return lines


def _op_tables(rows: Sequence[Row]) -> list[str]:
    lines = []
    for family, members in by(rows, lambda row: family_of(row["group"])).items():
        peers = list(dict.fromkeys(row["peer"] for row in members))
        lines += [f"## {TITLES.get(family, family)}", ""]
        body = []
        for group, found in by(members, lambda row: row["group"]).items():
            at = {row["peer"]: row for row in found}
            graph = _value(found, "graph_ours_us")
            body.append(
                [
                    f"`{group}`",
                    _first(found, "ours_us") + (f" ({number(graph)} in a graph)" if graph else ""),
                    _first(found, "gb_per_s"),
                    _share(found),
                    _first(found, "host_us"),
                    _size(_value(found, "peak_bytes")),
                    *(against(at.get(peer)) for peer in peers),
                ]
            )
        lines += [*table(["", "ours", "GB/s", "copy", "host", "memory", *peers], body), ""]
    return lines


def family_of(group: str) -> str:
    """The op that a group is of."""
    return re.split(r"[ ,]", group)[0]


def against(row: Row | None, memory: bool = True) -> str:
    """A peer's time, its ratio to ours and, if wanted and known, its memory; in italics if it does another job."""
    if row is None:
        return "–"
    text = f"{number(row['peer_us'])} ({number(row['ratio'])}×)"
    if memory and row.get("peer_peak_bytes"):
        text += f", {_size(row['peer_peak_bytes'])}"
    return text if row.get("same_result", True) else f"*{text}*"


def _floors(rows: Sequence[Row]) -> list[str]:
    """How many of the ratios that were aimed at were reached, and which were not."""
    aimed = [row for row in rows if is_aimed(row)]
    if not aimed:
        return []
    missed = [row for row in aimed if is_missed(row)]
    lines = ["## Aims", "", f"{len(aimed) - len(missed)} of {len(aimed)} ratios that were aimed at were reached.", ""]
    if missed:
        causes = [cause_of(row["group"], row["peer"]) for row in missed]
        body = [
            [
                f"`{row['group']}`",
                row["peer"],
                f"{number(row['ratio'])}×",
                f"≥ {row['floor']:.3g}×" if row.get("floor") is not None else f"≤ {row['ceiling']:.3g}×",
                f"*{cause.name}*" if cause is not None else "–",
            ]
            for row, cause in zip(missed, causes)
        ]
        lines += ["Not reached:", "", *table(["", "against", "found", "aim", "cause"], body), ""]
        lines += [*dict.fromkeys(f"- *{cause.name}*: {cause.text}" for cause in causes if cause is not None), ""]
    return lines


def is_aimed(row: Row) -> bool:
    """Whether anything was aimed at for a row of a peer and ours."""
    return row.get("floor") is not None or row.get("ceiling") is not None


def is_missed(row: Row) -> bool:
    """Whether a row of a peer and ours falls short of what was aimed at."""
    if row.get("floor") is not None:
        return row["ratio"] < row["floor"]
    return row.get("ceiling") is not None and row["ratio"] > row["ceiling"]


def _sampling(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            row["group"].removeprefix("sampling "),
            number(row["peer_us"] * row["per_step"] / 1e3),
            number(row["ours_us"] * row["per_step"] / 1e3),
            f"{row['ratio']:.2f}×",
        ]
        for row in rows
    ]
    note = (
        "`FDivSampler` against an eager loop written as EluCD and guided-diffusion do it, with the same networks; "
        "given the same noise, both make the same images to 2e-5."
    )
    return [note, "", *table(["", "eager loop, ms a step", "ours, ms a step", "gain"], body)]


def _options(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            row["group"].removeprefix("sampling ") + (" (does less work)" if row["changes_work"] else ""),
            number(row["peer_us"] * row["per_step"] / 1e3),
            number(row["ours_us"] * row["per_step"] / 1e3),
            f"{row['ratio']:.2f}×",
            number(row["difference"]),
            number(row.get("compile_s")),
        ]
        for row in rows
    ]
    note = (
        "Ours with an option against ours without it; the largest difference in a pixel (of −1 … 1) is what it costs. "
        "Compiling comes before, at the first batch of a shape, and is not in the gain."
    )
    heads = ["", "without, ms a step", "with, ms a step", "gain", "largest difference", "to compile, s"]
    return [note, "", *table(heads, body)]


def _parts(rows: Sequence[Row]) -> list[str]:
    parts = list(dict.fromkeys(part for row in rows for part in row["parts_us"]))
    body = []
    for row in rows:
        found = row["parts_us"]
        body.append(
            [
                row["group"].removeprefix("sampling ").removesuffix(", parts"),
                *(number(found[part] / 1e3) for part in parts),
                number((row["step_us"] - sum(found.values())) / 1e3),
                number(row["step_us"] / 1e3),
                number(row["eager_step_us"] / 1e3),
                f"{row['share_of_ours']:.1%}",
                f"{row['share_around']:.1%}",
            ]
        )
    heads = ["ms a step", *parts, "rest", "whole step", "eager loop's", "our ops", "all but the networks"]
    note = (
        "The networks are timed within whole runs on a CPU; on a GPU, as our ops everywhere, each part by itself. The "
        "rest is what lies between them: Python, noise, a run's beginning and end."
    )
    return [note, "", *table(heads, body)]


def _threads(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            f"`{row['group'].removeprefix('threads ')}`",
            *map(number, row["us"]),
            *(f"{one / two:.2f}×" for one, two in (row["us"], row["copy_us"])),
            *(number(row["bytes"] / two / 1e3) for _, two in (row["us"], row["copy_us"])),
        ]
        for row in rows
    ]
    note = (
        "Ours with one thread and with two, timed in turn, and a copy that reads and writes as many bytes: what is "
        "bound by memory gains what the copy does, what is bound by arithmetic up to twice."
    )
    heads = ["", "one thread, µs", "two, µs", "gain", "a copy's gain", "GB/s with two", "a copy's GB/s with two"]
    return [note, "", *table(heads, body)]


def _growth(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        power = row["exponent"]
        body.append(
            [
                row["group"].removeprefix("growth "),
                f"{row['sizes'][0]:,} … {row['sizes'][-1]:,}",
                f"{number(row['us'][0])} … {number(row['us'][-1])}",
                "mostly fixed cost" if power is None else f"{power:.2f}{' (too steep)' * (power > row['ceiling'])}",
            ]
        )
    note = (
        "The power of the work that the time grows with, where it grows steepest: 1 is as the work does, or as a "
        "copy's time where larger sizes leave the caches."
    )
    return [note, "", *table(["", "sizes", "ours, µs", "power"], body)]


def table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *body)]


def number(value: float | None) -> str:
    """Three digits, without exponents where they can be read; – for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _size(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"


def _value(rows: Sequence[Row], key: str) -> Any:
    """The median of the rows that have it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return median(found) if found else None


def _first(rows: Sequence[Row], key: str) -> str:
    return number(_value(rows, key))


def _share(rows: Sequence[Row]) -> str:
    share = _value(rows, "share_of_copy")
    return "–" if share is None else f"{share:.0%}"


def by(rows: Sequence[Row], key: Any) -> dict[str, list[Row]]:
    """Rows of each value of the key, in order."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


if __name__ == "__main__":
    main()
