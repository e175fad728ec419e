"""The demo: sample digits under every guidance method, measure them, and draw what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from calguide_fast.demo import checkpoints, pictures, report
from calguide_fast.demo.data import CLASSES
from calguide_fast.demo.experiment import (
    Figures,
    Lab,
    class_cycle,
    draw,
    measure,
    measure_real,
    summarise,
    trace_gradients,
)
from calguide_fast.demo.methods import METHODS, Method
from calguide_fast.samples import Samples, image_grid

TUNING_RUN = 1000  # seeds that strengths are chosen on are never those that are reported


@dataclass(frozen=True)
class Plan:
    """How much is sampled."""

    images: int = 600  # of each method and run
    runs: int = 1
    steps: str = "25"
    batch_size: int = 200
    traced: int = 200  # images whose gradients are traced
    tuned: int = 0  # images for each strength of the sweep; 0 keeps the strengths that an earlier sweep chose


QUICK = Plan()
FULL = Plan(images=2000, runs=3, tuned=1000)
SHOWN = 2 * CLASSES


def run_demo(
    out_dir: Path | str = "out/demo",
    full: bool = False,
    plan: Plan | None = None,
    methods: Sequence[Method] = METHODS,
    assets: Path = checkpoints.ASSETS,
    progress: bool = True,
) -> Path:
    """Run the comparison and write pictures and results; returns the folder.

    Takes under two minutes on two CPU cores; with `full`, the better part of an hour. Seeds are fixed, so that two runs
    on one machine agree.

    Args:
        out_dir: the folder to write to.
        full: three runs of 2,000 images, at strengths chosen anew by a sweep of six for every method.
        plan: how much to sample, in place of the two above.
        methods: what to compare.
        assets: where the checkpoints lie.
        progress: print a line for each method.
    """
    plan = plan or (FULL if full else QUICK)
    folder = Path(out_dir)
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    say = print if progress else _silence
    lab = Lab(assets)
    floor = measure_real(lab, plan.images)

    sweep: dict[str, list[dict[str, float]]] = {}
    if plan.tuned:
        methods = [_tuned(lab, method, plan, sweep, say) for method in methods]
        pictures.frontier_plot(sweep, asdict(measure_real(lab, plan.tuned)), folder / "frontier.png")

    measured: dict[str, list[Figures]] = {}
    shown: dict[str, Tensor] = {}
    for method in methods:
        measured[method.name] = []
        for run in range(plan.runs):
            samples, seconds = draw(lab, method, plan.images, run, plan.steps, plan.batch_size)
            figures = measure(lab, samples, seconds)
            measured[method.name].append(figures)
            say(f"{method.title:30}{report.cells(figures)}  {seconds:5.1f} s")
            if run == 0:
                _save_grid(samples, folder / "grids" / f"{method.name}.png")
                shown[method.name] = samples.images[:SHOWN]

    say("tracing gradients")
    trace = trace_gradients(lab, plan.traced, TUNING_RUN, plan.steps)
    pictures.gradient_plot(trace, folder / "gradient_norms.png")
    _save_sheet(lab, methods, shown, measured, floor, plan, folder / "contact_sheet.png")
    took = time.perf_counter() - start
    report.write(folder, plan, methods, measured, floor, sweep, trace, took)
    say(f"done in {took:.0f} s: look at {folder / 'contact_sheet.png'} and {folder / 'results.md'}")
    return folder


def _tuned(lab: Lab, method: Method, plan: Plan, sweep: dict[str, list[dict[str, float]]], say: Callable[..., None]) -> Method:
    """The method at its best strength: the one nearest to the training digits, so that the test digits stay unseen."""
    if not method.tunable:
        return method
    points = []
    for strength in method.strengths:
        samples, seconds = draw(lab, method.at(strength), plan.tuned, TUNING_RUN, plan.steps, plan.batch_size)
        points.append({"strength": strength, **asdict(measure(lab, samples, seconds))})
        say(f"sweep {method.title:30} {strength:6g}: {points[-1]['frechet_train']:.2f} to the training digits")
    sweep[method.name] = points
    return method.at(min(points, key=lambda point: point["frechet_train"])["strength"])


def _save_grid(samples: Samples, path: Path) -> None:
    pixels = samples.to_uint8()[: 10 * CLASSES]
    image_grid(pixels, columns=CLASSES, zoom=8).save(path)


def _save_sheet(
    lab: Lab,
    methods: Sequence[Method],
    shown: dict[str, Tensor],
    measured: dict[str, list[Figures]],
    floor: Figures,
    plan: Plan,
    path: Path,
) -> None:
    asked = class_cycle(SHOWN)

    def row(title: str, detail: str, figures: Figures, images: Tensor) -> pictures.SheetRow:
        wrong = lab.judged(images) != asked[: len(images)]
        return pictures.SheetRow(title, detail, report.cells(figures), images, wrong)

    by_digit = [lab.test.images[lab.test.labels == digit][: SHOWN // CLASSES] for digit in range(CLASSES)]
    rows = [row("Real digits", "pictures: test, figures: training", floor, torch.stack(by_digit, 1).flatten(0, 1))]
    for method in methods:
        figures = summarise(measured[method.name], mean)
        rows.append(row(method.title, report.formula(method), figures, shown[method.name]))
    pictures.contact_sheet(
        rows,
        f"Handwritten digits from the same noise under every method, {plan.steps} DDPM steps",
        "The first two seeds of each digit. Red frame: an independent network sees another class. "
        f"Figures: all {plan.images * plan.runs} images of a method against the 500 test digits.",
        path,
    )


def _silence(*_: object) -> None:
    pass
