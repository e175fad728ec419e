"""The demo's results in words and figures: results.md and results.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

import calguide_fast
from calguide_fast.demo import calibration_report
from calguide_fast.demo.calibration import Study
from calguide_fast.demo.checkpoints import SOFTPLUS_BETA
from calguide_fast.demo.experiment import Figures, GradientTrace, summarise
from calguide_fast.demo.methods import ALPHA, EPSILON, Method

if TYPE_CHECKING:
    from calguide_fast.demo.run import Plan

Sweep = Mapping[str, Sequence[Mapping[str, float]]]


HEADINGS = ("Fréchet", "precision", "recall", "class")


def cells(figures: Figures) -> tuple[str, str, str, str]:
    """What `HEADINGS` name: Fréchet distance, precision, recall and class accuracy."""
    return (
        f"{figures.frechet:.2f}",
        f"{figures.precision:.3f}",
        f"{figures.recall:.3f}",
        f"{figures.accuracy:.1%}",
    )


def formula(method: Method) -> str:
    """What the method computes, at which strength."""
    if method.strength is None:
        return method.formula
    return f"{method.formula}, {'w' if method.guidance is None else 'scale'} {method.strength:g}"


def write(
    folder: Path,
    plan: Plan,
    methods: Sequence[Method],
    measured: Mapping[str, Sequence[Figures]],
    floor: Figures,
    sweep: Sweep,
    trace: GradientTrace,
    study: Study | None,
    seconds: float,
) -> None:
    """Write `folder`/results.json and `folder`/results.md."""
    results = {
        "plan": asdict(plan),
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "calguide_fast": calguide_fast.__version__,
            "cores": os.cpu_count(),
        },
        "seconds": round(seconds, 1),
        "real_training_digits": asdict(floor),
        "methods": [
            {
                "name": method.name,
                "title": method.title,
                "formula": method.formula,
                "strength": method.strength,
                "overconfident": method.overconfident,
                "guidance": _settings(method),
                "mean": asdict(summarise(measured[method.name], mean)),
                "std": asdict(summarise(measured[method.name], stdev)) if plan.runs > 1 else None,
                "runs": [asdict(figures) for figures in measured[method.name]],
            }
            for method in methods
        ],
        "sweep": sweep,
        "gradients": asdict(trace),
        "calibration": None if study is None else calibration_report.results(study),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = _markdown(plan, methods, measured, floor, sweep, trace, study, seconds)
    (folder / "results.md").write_text(text, encoding="utf-8")


def _settings(method: Method) -> dict[str, object] | None:
    guidance = method.sampler_settings()["guidance"]
    return None if guidance is None else asdict(guidance)


def _markdown(
    plan: Plan,
    methods: Sequence[Method],
    measured: Mapping[str, Sequence[Figures]],
    floor: Figures,
    sweep: Sweep,
    trace: GradientTrace,
    study: Study | None,
    seconds: float,
) -> str:
    runs = f"{plan.runs} runs of {plan.images} images (mean ± standard deviation over runs)"
    parts = [
        "# Guided digits",
        f"{runs if plan.runs > 1 else f'{plan.images} images'} of each method, {plan.steps} DDPM steps, the same seeds "
        f"and labels for every method, {seconds:.0f} s in all. "
        "Look at `contact_sheet.png` first, at `rescued.png` for what guidance mends, at `grids/` for a hundred digits "
        "of each method, at `gradient_norms.png` for what saturates"
        + (", at `frontier.png` for the sweep" if sweep else "")
        + (", at `calibration.png` for what calibration mends" if study else "")
        + ".",
        _table(plan, methods, measured, floor),
        "**Fréchet** distance to the 500 test digits (lower is better; in brackets to the 1297 training digits), "
        "**precision** and **recall** (k = 3) against the test digits, all on 64 features of a network that guides "
        "nothing; **class**: share of images that this network reads as the digit asked for. The row of real digits "
        "is what a perfect sampler would get. **Gradient**: mean norm of the image gradient over all steps, before the "
        "scale. **Seconds** and images/s are those of one thread while others work beside it. Figures depend on the "
        "number of images: compare within this table only.",
        "## How strengths were chosen",
        _tuning(plan, sweep),
        "## What saturates",
        _saturation(trace),
    ]
    if sweep:
        parts += ["## The sweep", _sweep_table(methods, sweep)]
    if study:
        parts.append(calibration_report.section(study))
    return "\n\n".join(parts) + "\n"


def _table(plan: Plan, methods: Sequence[Method], measured: Mapping[str, Sequence[Figures]], floor: Figures) -> str:
    lines = [
        "| method | score and strength | Fréchet | precision | recall | class | gradient | seconds | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| real training digits | | {' | '.join(cells(floor))} | | | |",
    ]
    for method in methods:
        average = summarise(measured[method.name], mean)
        spread = summarise(measured[method.name], stdev) if plan.runs > 1 else None

        def cell(name: str, form: str, average: Figures = average, spread: Figures | None = spread) -> str:
            value = format(getattr(average, name), form)
            return value if spread is None else f"{value} ± {format(getattr(spread, name), form)}"

        gradient = f"{average.gradient_norm:.3g}" if method.guidance else "–"
        lines.append(
            f"| {method.title} | {formula(method)} | {cell('frechet', '.2f')} ({average.frechet_train:.2f}) "
            f"| {cell('precision', '.3f')} | {cell('recall', '.3f')} | {cell('accuracy', '.1%')} | {gradient} "
            f"| {average.seconds:.1f} | {average.images_per_second:.0f} |"
        )
    return "\n".join(lines)


def _tuning(plan: Plan, sweep: Sweep) -> str:
    origin = (
        f"just now, on {plan.tuned} images of other seeds"
        if sweep
        else "by an earlier `calguide-fast demo --full`, on 1000 images of other seeds"
    )
    return (
        "Each method was given six strengths, for the classifier's scale a factor of two apart, and keeps the one with "
        f"the lowest Fréchet distance to the *training* digits ({origin}). The test digits chose no strength; but the "
        "ranges of strengths and the recipes of the networks were settled in earlier trials that did look at them. "
        f"All else is as first written down: ε = {EPSILON:g}, γ = 0.3 for all but ADM-G, softplus β = "
        f"{SOFTPLUS_BETA:g} in both classifiers, tilt and entropy weight as the table has them (tilt groups of "
        f"{plan.batch_size} images, weights clipped at 3), and α = {ALPHA:g}, which comes from a prototype on the same "
        "data and to which the methods without a divergence have no counterpart. The guide has seen 300 labelled "
        "digits, its overconfident twin the same 300 without augmentation: compare the overconfident rows with each "
        "other."
    )


def _saturation(trace: GradientTrace) -> str:
    lines = [
        "The classifier's doubt, and the median norm of each term's image gradient by itself, along one unguided "
        "trajectory. Half-way and last are its steps; “fall” is the first over the smallest of all.",
        "",
        "| classifier | term | first | half-way | last | fall |",
        "|---|---|---|---|---|---|",
    ]
    for classifier, terms in trace.norms.items():
        doubt = trace.doubt[classifier]
        lines.append(
            f"| {classifier} | 1 − p(label) | {doubt[0]:.2g} | {doubt[len(doubt) // 2]:.2g} | {doubt[-1]:.2g} "
            f"| {_times(doubt[0] / min(doubt))} |"
        )
        for term, quartiles in terms.items():
            middle = [quartile[1] for quartile in quartiles]
            fall = middle[0] / min(middle)
            lines.append(
                f"| {classifier} | {term} | {middle[0]:.2g} | {middle[len(middle) // 2]:.2g} | {middle[-1]:.2g} "
                f"| {_times(fall)} |"
            )
    return "\n".join(lines)


def _times(factor: float) -> str:
    return f"{factor:.1f}×" if factor < 10 else f"{float(f'{factor:.2g}'):,.0f}×"


def _sweep_table(methods: Sequence[Method], sweep: Sweep) -> str:
    lines = [
        "| method | strength | Fréchet to training | Fréchet to test | precision | recall | class |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        for point in sweep.get(method.name, []):
            chosen = " (chosen)" if point["strength"] == method.strength else ""
            lines.append(
                f"| {method.title} | {point['strength']:g}{chosen} | {point['frechet_train']:.2f} "
                f"| {point['frechet']:.2f} | {point['precision']:.3f} | {point['recall']:.3f} "
                f"| {point['accuracy']:.1%} |"
            )
    return "\n".join(lines)
