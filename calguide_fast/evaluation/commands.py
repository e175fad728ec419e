"""What the command line's ``evaluate`` does: files in, figures out."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calguide_fast.evaluation.evaluator import Evaluation, evaluate
from calguide_fast.evaluation.inception import PROTOCOLS, PUBLISHED_AT
from calguide_fast.evaluation.measured import METRICS

EPILOG = f"""\
Nothing is downloaded. Inception's weights are published at
  {PUBLISHED_AT}
and OpenAI's reference batches in the README of openai/guided-diffusion's evaluations.

examples:
  calguide-fast evaluate samples_50000x128x128x3.npz VIRTUAL_imagenet128_labeled.npz \\
      --inception weights-inception-2015-12-05-6726825d.pth
  calguide-fast evaluate out/pictures reference/pictures --features my_network:features --metrics fid,precision,recall
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Measure samples against a reference: FID, sFID, Inception score, precision, recall, density, "
    parser.description += "coverage."
    parser.epilog = EPILOG
    parser.add_argument("samples", metavar="SAMPLES", help="an .npz file with arr_0, (N, H, W, 3) uint8; or a folder")
    parser.add_argument(
        "reference", metavar="REFERENCE", help="the same, or an .npz of statistics (mu, sigma, mu_s, sigma_s), or both"
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--inception", type=Path, metavar="PATH", help="Inception's weights; see below")
    network.add_argument(
        "--features", metavar="MODULE:FUNCTION", help="instead, your own (N, C, H, W) uint8 images -> (N, D) features"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="how Inception sees images: as in guided-diffusion's evaluator, or as in pytorch-fid (adm)",
    )
    parser.add_argument(
        "--metrics", default=",".join(METRICS), metavar="NAMES", help="separated by commas (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="JSON", help="write the figures there, and not to the screen")


def report_evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate what the options name, show a short table on stderr, and return all there is to know.

    Raises FileNotFoundError, TypeError, ValueError or ImportError as :func:`evaluate`.
    """
    found = evaluate(
        options.samples,
        options.reference,
        inception=options.inception,
        features=options.features,
        protocol=options.protocol,
        metrics=[name.strip() for name in options.metrics.split(",")],
        batch_size=options.batch_size,
        device=options.device,
    )
    print(_table(found), file=sys.stderr)
    files = {"samples_from": options.samples, "reference_from": options.reference}
    if options.inception is not None:
        files["weights_from"] = str(options.inception)
    return asdict(found) | files


def _table(found: Evaluation) -> str:
    lines = [f"{name:10} {value:.6g}" for name, value in found.metrics.items()]
    lines += [f"{name:10} left out: {why}" for name, why in found.left_out.items()]
    return "\n".join(lines)
