"""The command line: ``calguide-fast doctor | demo | train-demo``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import calguide_fast


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


def _need_demo_extra() -> None:
    """Stop with advice where the demo's own requirements are not installed."""
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"the demo needs {' and '.join(missing)}, which a plain install leaves out: "
            "pip install '.[demo]' in the source folder (or 'calguide_fast[demo]')"
        )
