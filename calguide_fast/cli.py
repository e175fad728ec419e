"""The command line: ``calguide-fast doctor | demo | sample | evaluate | sweep | …``; see its ``--help``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

import calguide_fast
from calguide_fast.calibration.commands import METHODS, report_calibration, report_noise_levels, report_reliability
from calguide_fast.calibration.sources import EPILOG, Source, add_source_options
from calguide_fast.evaluation.commands import add_options as add_evaluate_options
from calguide_fast.evaluation.commands import report_evaluation
from calguide_fast.generation.commands import run_sample
from calguide_fast.generation.options import add_options as add_sample_options
from calguide_fast.generation.run import ImagesNotFinite
from calguide_fast.generation.shards import DamagedShard
from calguide_fast.studies.reproduce import add_options as add_reproduce_options
from calguide_fast.studies.reproduce import run_reproduce
from calguide_fast.studies.sweep import add_options as add_sweep_options
from calguide_fast.studies.sweep import run_sweep

Result = TypeVar("Result")

# exit statuses: as argparse has it, and what begins and fails
WRONG_OPTIONS, FAILED = 2, 1
_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)
_BAD_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse's own has all the options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_OPTIONS, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="calguide-fast", description="Fused kernels for classifier guidance of diffusion models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {calguide_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="say which backends are built, loaded and chosen, and why not")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="sample handwritten digits under every guidance method")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for pictures and results (%(default)s)"
    )
    demo.add_argument(
        "--full",
        action="store_true",
        help="more seeds and images, a sweep of strengths, and a study of calibration (about an hour)",
    )
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train-demo", help="train the demo's networks anew")
    train.add_argument(
        "--out",
        type=Path,
        default=Path("out/train-demo"),
        help="folder for the checkpoints (%(default)s); in a checkout calguide_fast/demo/assets replaces the package's",
    )
    train.set_defaults(run=_train_demo)

    sample = commands.add_parser("sample", help="sample many images, on many GPUs or machines, and resume")
    add_sample_options(sample)
    sample.set_defaults(run=_sample)

    sweep = commands.add_parser(
        "sweep",
        help="sample and measure a grid of divergences, alphas, epsilons and scales",
        conflict_handler="resolve",
    )
    add_sweep_options(sweep)
    sweep.set_defaults(run=_sweep)

    reproduce = commands.add_parser("reproduce", help="sample and measure the published table of ImageNet 128x128")
    add_reproduce_options(reproduce)
    reproduce.set_defaults(run=_reproduce)

    reliability = commands.add_parser(
        "reliability",
        help="smooth ECE, accuracy and confidence of a file's or a classifier's predictions, and their diagram",
        description="Measure the calibration of predictions in a file, or of a classifier on labelled images.",
        epilog=EPILOG,
    )
    reliability.add_argument(
        "--bandwidth", type=float, metavar="SIGMA", help="sigma of the smooth ECE, if not the one that equals its value"
    )
    reliability.set_defaults(run=_reliability)
    calibrate = commands.add_parser(
        "calibrate",
        help="fit temperature or vector scaling to a file's or a classifier's logits",
        description="Fit a scaling to logits in a file, or of a classifier on labelled images, and measure calibration "
        "before and after.",
        epilog=f"{EPILOG} Confidences alone are not enough here.",
    )
    calibrate.add_argument("--method", choices=METHODS, default="temperature", help="(%(default)s)")
    calibrate.add_argument(
        "--test", type=Path, metavar="FILE|DATA", help="measure and draw these, too, which are not fitted"
    )
    calibrate.set_defaults(run=_calibrate)
    for command in (reliability, calibrate):
        add_source_options(command)
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

    _in_one_line(lambda: run_demo(options.out, full=options.full))
    return 0


def _train_demo(options: argparse.Namespace) -> int:
    _need_demo_extra()
    from calguide_fast.demo.train import train_demo

    _in_one_line(lambda: train_demo(options.out))
    return 0


def _sample(options: argparse.Namespace) -> int:
    return _in_one_line(lambda: run_sample(options))


def _sweep(options: argparse.Namespace) -> int:
    return _in_one_line(lambda: run_sweep(options))


def _reproduce(options: argparse.Namespace) -> int:
    return _in_one_line(lambda: run_reproduce(options))


def _reliability(options: argparse.Namespace) -> int:
    def measure() -> dict[str, Any]:
        source = Source(options)
        if source.noised:
            return report_noise_levels(source.classified(), source.schedule, options.out, options.bandwidth)
        return report_reliability(source.predictions(), options.out, options.bandwidth)

    return _report(measure, options)


def _calibrate(options: argparse.Namespace) -> int:
    def measure() -> dict[str, Any]:
        source = Source(options)
        test = None if options.test is None else source.predictions(options.test)
        return report_calibration(source.predictions(), options.method, test, options.out)

    return _report(measure, options)


def _evaluate(options: argparse.Namespace) -> int:
    return _report(lambda: report_evaluation(options), options)


def _report(measure: Callable[[], dict[str, Any]], options: argparse.Namespace) -> int:
    """Show or write what was measured."""
    figures = _in_one_line(measure)
    text = json.dumps(figures, indent=2)
    if options.json is None:
        print(text)
    else:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            # what may have taken hours to measure is not lost with the file
            print(text)
            raise _stopped(error) from None
    return 0


def _in_one_line(work: Callable[[], Result]) -> Result:
    """What `work` returns; an unusable file or setting is one line, not a traceback."""
    try:
        return work()
    except (OSError, TypeError, ValueError, ImportError, *_NO_MEMORY) as error:
        raise _stopped(error) from None


def _stopped(error: Exception) -> SystemExit:
    """What ends the program, having said why."""
    failed = isinstance(error, (DamagedShard, ImagesNotFinite, *_NO_MEMORY))
    failed |= isinstance(error, OSError) and not isinstance(error, _BAD_PATHS)
    # a GPU's goes on about its allocator; Python's own may have nothing to say
    reason = f"out of memory: {str(error).partition('. ')[0]}" if isinstance(error, _NO_MEMORY) else str(error)
    stop = SystemExit(f"calguide-fast: {reason.removesuffix(': ')}")
    # Python prints what is no number, and then the status is 1
    print(stop, file=sys.stderr)
    stop.code = FAILED if failed else WRONG_OPTIONS
    return stop


def _need_demo_extra() -> None:
    """Stop with advice where the demo's own requirements are not installed."""
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"the demo needs {' and '.join(missing)}, which a plain install leaves out: "
            "pip install '.[demo]' in the source folder (or 'calguide_fast[demo]')"
        )
