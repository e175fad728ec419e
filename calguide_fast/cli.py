"""The command line: ``calguide-fast doctor | demo | train-demo | reliability | calibrate | evaluate``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import calguide_fast
from calguide_fast.calibration.commands import METHODS, report_calibration, report_reliability
from calguide_fast.calibration.files import ACCEPTED
from calguide_fast.evaluation.commands import add_options as add_evaluate_options
from calguide_fast.evaluation.commands import report_evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calguide-fast", description="Fused kernels for classifier guidance of diffusion models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {calguide_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="say which backends are built, loaded and chosen, and why not")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="sample handwritten digits under every guidance method")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for pictures and results (%(default)s)"
    )
    demo.add_argument("--full", action="store_true", help="more seeds and images, and a sweep of scales (much longer)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train-demo", help="train the demo's networks anew")
    train.add_argument("--out", type=Path, default=None, help="folder for the checkpoints (the package's own assets)")
    train.set_defaults(run=_train_demo)

    reliability = commands.add_parser(
        "reliability",
        help="smooth ECE, accuracy and confidence of predictions in a file, and their diagram",
        description="Measure the calibration of predictions in a file.",
        epilog=f"The file holds {ACCEPTED}",
    )
    reliability.add_argument(
        "--bandwidth", type=float, help="sigma of the smooth ECE, if not the one that equals its value"
    )
    reliability.set_defaults(run=_reliability)
    calibrate = commands.add_parser(
        "calibrate",
        help="fit temperature or vector scaling to logits in a file",
        description="Fit a scaling to logits in a file, and measure calibration before and after.",
        epilog=f"The file holds {ACCEPTED} Confidences alone are not enough here.",
    )
    calibrate.add_argument("--method", choices=METHODS, default="temperature", help="(%(default)s)")
    calibrate.add_argument(
        "--test", type=Path, metavar="FILE", help="measure and draw these predictions, too, not fitted"
    )
    calibrate.set_defaults(run=_calibrate)
    for command in (reliability, calibrate):
        command.add_argument("file", type=Path, metavar="FILE", help="an .npz or .csv file of predictions; see below")
        command.add_argument("--out", type=Path, metavar="PNG", help="write the reliability diagram (needs matplotlib)")
        command.add_argument("--json", type=Path, metavar="JSON", help="write the figures there, and not to the screen")

    evaluate = commands.add_parser("evaluate", help="FID, precision, recall and more of samples in a file or a folder")
    add_evaluate_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    report = calguide_fast.backend_report()
    print(report)
    return 1 if any(status.missing for status in report) else 0


def _demo(options: argparse.Namespace) -> int:
    _need_demo_extra()
    from calguide_fast.demo.run import run_demo

    run_demo(options.out, full=options.full)
    return 0


def _train_demo(options: argparse.Namespace) -> int:
    _need_demo_extra()
    from calguide_fast.demo.train import train_demo

    train_demo(options.out)
    return 0


def _reliability(options: argparse.Namespace) -> int:
    return _report(lambda: report_reliability(options.file, options.out, options.bandwidth), options)


def _calibrate(options: argparse.Namespace) -> int:
    return _report(lambda: report_calibration(options.file, options.method, options.test, options.out), options)


def _evaluate(options: argparse.Namespace) -> int:
    return _report(lambda: report_evaluation(options), options)


def _report(measure: Callable[[], dict[str, Any]], options: argparse.Namespace) -> int:
    """Show or write what was measured; an unusable file or setting is one line, not a traceback."""
    try:
        figures = measure()
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise SystemExit(f"calguide-fast: {error}") from None
    text = json.dumps(figures, indent=2)
    if options.json is None:
        print(text)
    else:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _need_demo_extra() -> None:
    """Stop with advice where the demo's own requirements are not installed."""
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"the demo needs {' and '.join(missing)}, which a plain install leaves out: "
            "pip install '.[demo]' in the source folder (or 'calguide_fast[demo]')"
        )
