"""What ``calguide-fast sweep`` does: a grid of guidance in, its figures and their frontier out."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calguide_fast.evaluation.inception import PROTOCOLS
from calguide_fast.generation.atomic import replacing, write_bytes
from calguide_fast.generation.devices import own_device
from calguide_fast.generation.options import (
    RECIPES_EPILOG,
    add_guidance,
    add_images,
    add_machine,
    add_networks,
    add_process,
)
from calguide_fast.generation.presets import DIGITS, PRESETS
from calguide_fast.generation.settings import file_hash
from calguide_fast.generation.team import Team
from calguide_fast.generation.together import say, together
from calguide_fast.studies.digits import digits_measure
from calguide_fast.studies.grid import DIVERGENCES, FACTORS, grid_points
from calguide_fast.studies.measure import Judge, Measure
from calguide_fast.studies.series import HOW_TO_GO_ON, Point, run_series

DESCRIPTION = """\
Sample with every divergence, alpha and epsilon at every scale, with the same seeds, labels, steps and number of
images, and measure each: Frechet distance, class accuracy, precision and recall.

The options are those of `sample`, of which those of the grid take several values. Each point is a folder as
`sample` makes it. Killed, the same command goes on; with other values it adds points, and keeps the folders that are
there, while results.json holds the points of the last command. Under torchrun the processes share each point's batches.
In parentheses: what holds unless an option is given.
"""
EPILOG = f"""\
{RECIPES_EPILOG}
examples:
  calguide-fast sweep --preset digits --num-samples 500 --out out/sweep
  torchrun --nproc-per-node 8 -m calguide_fast sweep --preset imagenet128 --unet 128x128_diffusion.pt \\
      --classifier resnet101:resnet101-cd907fc2.pth --num-samples 10000 --dtype bf16 \\
      --divergence js,reverse_kl --alpha 0.5,1,2 --epsilon 0.5,0.9 --scale 0.5,1,1.5 \\
      --reference VIRTUAL_imagenet128_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth \\
      --classifier-judge resnet152:resnet152-f82ba261.pth --out out/sweep
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser, whose later options are to replace earlier ones of their names."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    grid = parser.add_argument_group("grid")
    for add in (add_networks, add_images, add_process, add_guidance, add_machine):
        add(parser)
    grid.add_argument("--divergence", metavar="NAMES", help=f"separated by commas ({','.join(DIVERGENCES)})")
    grid.add_argument("--alpha", metavar="NUMBERS", help="separated by commas (the recipe's)")
    grid.add_argument("--epsilon", metavar="NUMBERS", help="separated by commas (the recipe's)")
    factors = ", ".join(f"{factor:g}" for factor in FACTORS)
    grid.add_argument("--scale", metavar="NUMBERS", help=f"separated by commas ({factors} times the recipe's)")
    grid.add_argument(
        "--max-guidance", metavar="NUMBERS", help="with the edm rule in place of --scale, by the same factors"
    )

    measure = parser.add_argument_group("measure", "For digits all but the batch size is the demo's.")
    measure.add_argument("--reference", metavar="REFERENCE", help="images or statistics, as `evaluate` takes them")
    measure.add_argument("--inception", type=Path, metavar="PATH", help="Inception's weights, see `evaluate --help`")
    measure.add_argument("--features", metavar="MODULE:FUNCTION", help="instead, your own features, as of `evaluate`")
    measure.add_argument("--protocol", choices=PROTOCOLS, default="adm", help="how Inception sees images (%(default)s)")
    measure.add_argument(
        "--classifier-judge",
        metavar="NAME:PATH",
        help="a classifier, named as by --classifier, whose opinion the class accuracy is; a ResNet sees images at 224 "
        "pixels (no accuracy)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with, or to add points to"
    )


def run_sweep(options: argparse.Namespace) -> int:
    """Sweep as the options say, alone or as one of torchrun's processes; returns the exit status.

    Raises:
        ValueError, TypeError, ImportError: settings that are wrong or contradict each other; as `evaluate`.
        OSError: a file cannot be read or written; it is named.
    """
    points = grid_points(options)

    def work(team: Team) -> None:
        if team.rank == 0 and importlib.util.find_spec("matplotlib") is None:
            say("matplotlib is not installed, so there will be no frontier.png: pip install matplotlib")
        report = partial(write_sweep, options.out, points[0])
        run_series(points, options.out, partial(_measure, options), team, report)
        if team.rank == 0:
            print(options.out / "results.json")

    return together(work, options.preset, HOW_TO_GO_ON)


def write_sweep(out: Path, point: Point, measure: Measure, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``results.json``, ``results.csv`` and, where it can be drawn, ``frontier.png`` of the points so far.

    Args:
        out: folder of the sweep.
        point: any of them, for what they have in common.
        measure: what measured them.
        rows: their columns and figures.
    """
    job = point.job
    shared = {"preset": job.options.preset, "images": len(job.plan), "steps": job.steps, "method": job.options.method}
    results = {**shared, "measured_with": measure.settings, "points": rows}
    write_bytes(out / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out / "results.csv", table.getvalue().encode())
    if importlib.util.find_spec("matplotlib") is not None:
        from calguide_fast.studies.frontier import frontier_panels, frontier_plot, strength_of

        if not frontier_panels(rows):
            return
        heading = f"{shared['preset']}: {shared['images']} images a point, the same seeds and labels, "
        heading += f"{shared['steps']} {shared['method'].upper()} steps. Numbers: {strength_of(rows[0])}"
        with replacing(out / "frontier.png") as file:
            frontier_plot(rows, heading, file)


def _measure(options: argparse.Namespace) -> Measure:
    batch_size = PRESETS[options.preset].batch_size if options.batch_size is None else options.batch_size
    given = [name for name in ("reference", "inception", "features", "classifier_judge") if vars(options)[name]]
    if options.preset == DIGITS:
        if given:
            raise ValueError(f"the preset {DIGITS} brings its own measure, and takes no {given[0].replace('_', '-')}")
        return digits_measure(batch_size, own_device(options.device))
    if options.reference is None or (options.inception is None) == (options.features is None):
        raise ValueError(
            f"the preset {options.preset} needs a measure: --reference, and either --inception or --features"
        )
    judge = options.classifier_judge
    if judge in (options.classifier or ()):
        say("the judge is the classifier that guides, so the class accuracy says how well it is obeyed, and no more")
    return Measure(
        options.reference,
        reference_name(options.reference),
        options.features or options.inception,
        options.protocol,
        None if judge is None else Judge.of(judge),
        batch_size=batch_size,
        device=own_device(options.device),
    )


def reference_name(reference: str) -> str:
    """A file's own name and SHA-256; of a folder, the path."""
    path = Path(reference).expanduser()
    return f"{path.name} {file_hash(path)}" if path.is_file() else str(path)
