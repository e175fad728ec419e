"""The demo: sample digits under every guidance method, measure them, and draw what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from calguide_fast.demo import checkpoints, pictures, report
from calguide_fast.demo.calibration import CalibrationPlan, study_calibration
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
from calguide_fast.demo.threads import one_thread
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
    calibration: CalibrationPlan | None = None


QUICK = Plan()
FULL = Plan(images=2000, runs=3, tuned=1000, calibration=CalibrationPlan())
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
        full: three runs of 2,000 images, at strengths chosen anew by a sweep of six for every method; and what
            calibrating an overconfident classifier does to its guidance.
        plan: how much to sample, in place of the two above.
        methods: what to compare.
        assets: where the checkpoints lie.
        progress: print a line for each method.
    """
    folder = Path(out_dir)
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    say = print if progress else _silence
    with one_thread() as cores, ThreadPoolExecutor(cores) as pool:
        _run(folder, plan or (FULL if full else QUICK), methods, Lab(assets), pool, say)
    return folder


def _run(
    folder: Path,
    plan: Plan,
    methods: Sequence[Method],
    lab: Lab,
    pool: ThreadPoolExecutor,
    say: Callable[..., None],
) -> None:
    start = time.perf_counter()
    sweep: dict[str, list[dict[str, float]]] = {}
    if plan.tuned:
        methods = _tuned(lab, methods, plan, pool, sweep, say)
        pictures.frontier_plot(sweep, asdict(measure_real(lab, plan.tuned)), folder / "frontier.png")

    tracing = pool.submit(trace_gradients, lab, plan.traced, TUNING_RUN, plan.steps)
    jobs = [(method, run) for method in methods for run in range(plan.runs)]
    drawn = pool.map(lambda job: draw(lab, job[0], job[1], plan.images, plan.steps, plan.batch_size), jobs)
    measured: dict[str, list[Figures]] = {method.name: [] for method in methods}
    first: dict[str, Tensor] = {}
    for (method, run), (samples, seconds) in zip(jobs, drawn, strict=True):
        figures = measure(lab, samples, seconds)
        measured[method.name].append(figures)
        say(f"{method.title:30}", "".join(f"{cell:>8}" for cell in report.cells(figures)), f"{seconds:7.1f} s")
        if run == 0:
            _save_grid(samples, folder / "grids" / f"{method.name}.png")
            first[method.name] = samples.images

    floor = measure_real(lab, plan.images)
    trace = tracing.result()
    pictures.gradient_plot(trace, folder / "gradient_norms.png")
    _save_contact_sheet(lab, methods, first, measured, floor, plan, folder / "contact_sheet.png")
    _save_rescued(lab, methods, first, folder / "rescued.png")
    study = None
    if plan.calibration:
        study = study_calibration(lab, plan.calibration, pool, say)
        pictures.calibration_panels(study, lab.test.labels, folder / "calibration.png")
    took = time.perf_counter() - start
    report.write(folder, plan, methods, measured, floor, sweep, trace, study, took)
    say(f"done in {took:.0f} s: look at {folder / 'contact_sheet.png'} and {folder / 'results.md'}")


def _tuned(
    lab: Lab,
    methods: Sequence[Method],
    plan: Plan,
    pool: ThreadPoolExecutor,
    sweep: dict[str, list[dict[str, float]]],
    say: Callable[..., None],
) -> list[Method]:
    """The methods at their best strengths: nearest to the training digits, so that the test digits have no say."""
    jobs = [method.at(strength) for method in methods for strength in method.strengths]
    drawn = pool.map(lambda method: draw(lab, method, TUNING_RUN, plan.tuned, plan.steps, plan.batch_size), jobs)
    for method, (samples, seconds) in zip(jobs, drawn, strict=True):
        point = {"strength": method.strength, **asdict(measure(lab, samples, seconds))}
        sweep.setdefault(method.name, []).append(point)
        say(f"sweep {method.title:30} {method.strength:6g}: {point['frechet_train']:.2f} from the training digits")
    best = {name: min(points, key=lambda point: point["frechet_train"])["strength"] for name, points in sweep.items()}
    return [method.at(best[method.name]) if method.strengths else method for method in methods]


def _save_grid(samples: Samples, path: Path) -> None:
    pixels = samples.to_uint8()[: 10 * CLASSES]
    image_grid(pixels, columns=CLASSES, zoom=8).save(path)


def _save_contact_sheet(
    lab: Lab,
    methods: Sequence[Method],
    first: dict[str, Tensor],
    measured: dict[str, list[Figures]],
    floor: Figures,
    plan: Plan,
    path: Path,
) -> None:
    asked = class_cycle(min(SHOWN, plan.images))

    def row(title: str, detail: str, figures: Figures, images: Tensor) -> pictures.SheetRow:
        images = images[: len(asked)]
        return pictures.SheetRow(title, detail, report.cells(figures), images, lab.judged(images) != asked)

    by_digit = [lab.test.images[lab.test.labels == digit][: SHOWN // CLASSES] for digit in range(CLASSES)]
    rows = [row("Real digits", "pictures: test, figures: training", floor, torch.stack(by_digit, 1).flatten(0, 1))]
    for method in methods:
        figures = summarise(measured[method.name], mean)
        rows.append(row(method.title, report.formula(method), figures, first[method.name]))
    pictures.sheet(
        rows,
        [str(digit) for digit in range(CLASSES)],
        report.HEADINGS,
        f"Handwritten digits from the same noise under every method, {plan.steps} DDPM steps",
        "The first two seeds of each digit. Red frame: an independent network sees another class. "
        f"Figures: all {plan.images * plan.runs} images of a method, against the 500 test digits.",
        path,
    )


def _save_rescued(lab: Lab, methods: Sequence[Method], first: dict[str, Tensor], path: Path) -> None:
    """What each method makes of the noise from which the first method listed, the unguided one, draws a wrong digit."""
    asked = class_cycle(len(first[methods[0].name]))
    missed = torch.nonzero(lab.judged(first[methods[0].name]) != asked)[:, 0]
    # at most two of each class, so that the classes mistaken most do not fill the picture
    chosen = torch.cat([missed[asked[missed] == digit][: SHOWN // CLASSES] for digit in range(CLASSES)])
    if len(chosen) == 0:
        return
    rows = []
    for method in methods:
        wrong = lab.judged(first[method.name]) != asked
        detail = report.formula(method)
        mended = "" if method is methods[0] else f"{(~wrong[missed]).sum()} of {len(missed)}"
        rows.append(pictures.SheetRow(method.title, detail, (mended,), first[method.name][chosen], wrong[chosen]))
    pictures.sheet(
        rows,
        [str(digit) for digit in asked[chosen].tolist()],
        ("mended",),
        f"What becomes of the digits that {methods[0].title.lower()} sampling gets wrong",
        "Above: the digit asked for. Red frame: an independent network sees another.\n"
        "The first two failures of each digit: chosen for the first row's sake, so the others may fail elsewhere.",
        path,
    )


def _silence(*_: object) -> None:
    pass
