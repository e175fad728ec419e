"""What ``calguide-fast reproduce`` does: published weights in, the published table beside our own out."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calguide_fast.evaluation.inception import PROTOCOLS
from calguide_fast.generation.atomic import write_bytes
from calguide_fast.generation.devices import own_device
from calguide_fast.generation.options import add_images, add_machine
from calguide_fast.generation.presets import PRESETS
from calguide_fast.generation.team import Team
from calguide_fast.generation.together import together
from calguide_fast.studies.forecast import MEASURED_ROW, forecast, forecast_text, rate_of
from calguide_fast.studies.gpus import PEAKS, UTILISATION
from calguide_fast.studies.markdown import markdown_table
from calguide_fast.studies.measure import Measure
from calguide_fast.studies.published import REFERENCE, URLS, files_in, missing_files
from calguide_fast.studies.rows import PRESET, ROWS, architectures, row_points
from calguide_fast.studies.series import HOW_TO_GO_ON, Point, run_series
from calguide_fast.studies.sweep import reference_name

METRICS = ("fid", "sfid", "is", "precision", "recall")
IMAGES, STEPS = 50_000, "250"  # of the published figures

DESCRIPTION = f"""\
Sample and measure the published table of ImageNet 128x128: 50,000 images a row in 250 DDPM steps, with the published
networks, and write each figure beside the published one.

Alpha, epsilon and scale of the rows that have a divergence are not known from the paper: the defaults are this
package's own, and `sweep` finds others. Killed, the same command goes on; under torchrun the processes share each
row's batches. Begin with --dry-run. Rows: {", ".join(ROWS)}.
"""
EPILOG = "Files, by the names they are published under:\n" + "".join(
    f"  {url}\n" for url in (*URLS.values(), REFERENCE)
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("table", choices=[PRESET], help="the one table there is")
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="folder of the files below")
    parser.add_argument("--reference", type=Path, required=True, metavar="NPZ", help="OpenAI's reference batch")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out") / PRESET,
        metavar="DIR",
        help="a new folder, or one to go on with (%(default)s)",
    )
    parser.add_argument(
        "--rows", default=",".join(ROWS), metavar="NAMES", help="of the table, separated by commas (all)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="adm", help="how Inception sees images (%(default)s)")

    divergence = parser.add_argument_group("rows that have a divergence")
    divergence.add_argument("--alpha", type=float, help="weight of the divergence (1, which is ours)")
    divergence.add_argument("--epsilon", type=float, help="weight of the label in its target (0.9, which is ours)")
    divergence.add_argument("--scale", type=float, help="of the image gradient (1, EluCD's)")

    add_images(parser)
    parser.add_argument("--steps", default=STEPS, help="guided-diffusion's timestep_respacing (%(default)s)")
    # as the published code draws them
    parser.set_defaults(labels="random")
    add_machine(parser)

    plan = parser.add_argument_group("forecast", "What the table takes. Hours are an estimate, not a measurement.")
    plan.add_argument("--dry-run", action="store_true", help="show it and the missing files, and sample nothing")
    rate = plan.add_mutually_exclusive_group()
    rate.add_argument("--tflops", type=float, help="TFLOP/s that one GPU reaches in sampling")
    rate.add_argument(
        "--images-per-second", type=float, metavar="RATE", help=f"that one GPU reaches on the row {MEASURED_ROW}"
    )
    rate.add_argument("--gpu", metavar="NAME", help=f"by its data sheet: {', '.join(PEAKS)}")
    plan.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help=f"of that GPU's peak that sampling reaches ({UTILISATION}, an assumption)",
    )
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="how many share the hours (%(default)s)")


def run_reproduce(options: argparse.Namespace) -> int:
    """Reproduce the table as the options say, alone or as one of torchrun's processes; returns the exit status.

    Raises:
        FileNotFoundError: published files are missing; all of them are named, with where they are published.
        ValueError, TypeError, ImportError: settings that are wrong; a file that is not what its name says.
        OSError: a file cannot be read or written; it is named.
    """
    names = [name.strip() for name in options.rows.split(",")]
    files = files_in(options.weights.expanduser())
    divergence = {name: getattr(options, name) for name in ("alpha", "epsilon", "scale")}
    shared = {name: value for name, value in vars(options).items() if name not in divergence}
    points = row_points(names, files, divergence, {**shared, "resume": True})
    missing = missing_files(files, ["unet", *architectures(names), "inception"], options.reference)
    if options.dry_run:
        print(plan_text(points, options, missing))
        return 0
    if missing:
        raise FileNotFoundError("nothing is downloaded, and these files are missing:\n  " + "\n  ".join(missing))

    def make_measure() -> Measure:
        return Measure(
            options.reference,
            reference_name(str(options.reference)),
            files["inception"],
            options.protocol,
            metrics=METRICS,
            batch_size=PRESETS[PRESET].batch_size if options.batch_size is None else options.batch_size,
            device=own_device(options.device),
        )

    def work(team: Team) -> None:
        run_series(points, options.out, make_measure, team, partial(write_table, options.out, points))
        if team.rank == 0:
            print(options.out / "table.md")

    return together(work, PRESET, HOW_TO_GO_ON)


def plan_text(points: Sequence[Point], options: argparse.Namespace, missing: Sequence[str]) -> str:
    """The forecast, the room on the disk, and the missing files.

    Raises ValueError as `rate_of`.
    """
    if options.gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {options.gpus}")
    rows = [forecast(point) for point in points]
    rate = rate_of(rows, options.dtype, options.tflops, options.images_per_second, options.gpu, options.utilisation)
    text = forecast_text(rows, options.dtype, rate, options.gpus)
    there = next(folder for folder in (options.out, *options.out.absolute().parents) if folder.exists())
    text += f"\n{there} has {shutil.disk_usage(there).free / 1e9:.0f} GB free.\n"
    if missing:
        text += "\nMissing files:\n" + "".join(f"- {line}\n" for line in missing)
    return text.rstrip()


def write_table(out: Path, points: Sequence[Point], measure: Measure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``results.json`` and ``table.md``: the rows so far, published and measured.

    Args:
        out: folder of the table.
        points: all that are planned.
        measure: what measured the rows.
        rows: columns and figures.
    """
    job = points[0].job
    images, steps = len(job.plan), str(job.steps)
    found = [{**row, "title": ROWS[row["row"]].title, "published": dict(ROWS[row["row"]].published)} for row in rows]
    for row, entry in zip(rows, found):
        entry["published_in"] = ROWS[row["row"]].source
    results = {
        "table": PRESET,
        "images": images,
        "steps": steps,
        "dtype": job.options.dtype,
        "labels": job.options.labels,
        "measured_with": measure.settings,
        "rows": found,
    }
    write_bytes(out / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    write_bytes(out / "table.md", table_text(found, images, steps, measure).encode())


def table_text(rows: Sequence[Mapping[str, Any]], images: int, steps: str, measure: Measure) -> str:
    """The table as Markdown, with what one must know to read it."""
    headings = ["row", "FID published", "FID", "difference", "precision publ.", "precision", "recall publ.", "recall"]
    headings += ["sFID", "IS", "α", "ε", "scale"]
    cells = []
    for row in rows:
        published = row["published"]
        line = [row["title"], f"{published['fid']:.2f}", f"{row['fid']:.2f}", f"{row['fid'] - published['fid']:+.2f}"]
        for name in ("precision", "recall"):
            line += [_figure(published.get(name)), _figure(row.get(name))]
        line += [_figure(row.get("sfid")), _figure(row.get("is"), ".1f")]
        cells.append([*line, *(_figure(row.get(name), "g") for name in ("alpha", "epsilon", "scale"))])
    text = f"# ImageNet 128×128, {images:,} images, {steps} DDPM steps\n\n{markdown_table(headings, cells)}\n"
    text += "Published figures: " + "; ".join(
        f"{', '.join(row['title'] for row in rows if row['published_in'] == source)}: {source}"
        for source in dict.fromkeys(row["published_in"] for row in rows)
    )
    text += (
        f".\nMeasured by the protocol {measure.protocol}, against {measure.reference_name.partition(' ')[0]}. ADM's "
        "figures were published by its own evaluator (adm), EluCD's code calls pytorch-fid.\n"
    )
    if any(row.get("alpha") is not None for row in rows):
        text += (
            "α, ε and scale of rows with a divergence are this package's, or were given: the paper's are not known.\n"
        )
    if (images, steps) != (IMAGES, STEPS):
        text += f"The published figures are of {IMAGES:,} images in {STEPS} steps: these do not compare with them.\n"
    return text


def _figure(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)
