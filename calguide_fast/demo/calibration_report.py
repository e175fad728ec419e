"""The calibration study in words and figures: its section of results.md, its part of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any, TypeVar

from calguide_fast.demo.calibration import ARMS, CROSS_ENTROPY, LOSSES, TEMPERATURE, Guided, HeldOut, Study, best_scale
from calguide_fast.demo.experiment import Figures, summarise
from calguide_fast.demo.methods import Method

Row = TypeVar("Row", HeldOut, Figures)

# the figures of each table's columns, and how they are written
_HELD_OUT = {
    "smooth_ece": ".3f",
    "by_chance": ".3f",
    "huber_ece": ".3f",
    "accuracy": ".1%",
    "cross_entropy": ".3f",
    "confidence": ".1%",
}
_GUIDED = {"frechet": ".2f", "precision": ".3f", "recall": ".3f", "accuracy": ".1%", "gradient_norm": ".2f"}


def results(study: Study) -> dict[str, Any]:
    """What the study found, as JSON takes it; its plan is a part of the demo's."""
    return {
        "seconds": round(study.seconds, 1),
        "sweep": {arm: [asdict(point) for point in points] for arm, points in study.sweep.items()},
        "chosen": {arm: asdict(point) for arm, point in study.chosen.items()},
        "temperatures": study.temperatures,
        "held_out": {arm: _statistics(runs) for arm, runs in study.held_out.items()},
        "guided": [
            {"arm": point.arm, "method": point.method, "scale": point.scale, **_statistics(point.runs)}
            for point in study.guided
        ],
        "gradients": asdict(study.trace),
    }


def section(study: Study) -> str:
    """The study's section, in Markdown."""
    plan = study.plan
    return "\n\n".join(
        [
            "## Calibration and guidance",
            f"{plan.seeds} overconfident classifiers (mean ± standard deviation over them), trained on "
            f"{plan.recipe.labels} digits without augmentation until the loss is nil, and four repairs of each, for "
            f"which there are {plan.calibration_labels} labelled digits that are new to it. Temperature scaling takes "
            f"these as they are, fine-tuning takes them and the base's own, augmented anew in each of {plan.epochs} "
            "epochs, with cross-entropy alone (the control) or with a calibration loss beside it. The "
            "network that is calibrated is the one that guides, softplus and all. The figures are those of the "
            f"{len(next(iter(study.logits.values())))} test digits, {study.seconds:.0f} s in all; `calibration.png` "
            "shows the first classifier's reliability.",
            _held_out_table(study),
            "**Smooth ECE** of the top label; **by chance** is what it would be, on average, were every confidence "
            "true: so few samples cannot show a classifier to be better than that. **NLL**: cross-entropy in nats. "
            "Learning rate and loss weight are those of the lowest smooth ECE on "
            f"{plan.validation_labels} validation digits, mean over the classifiers, of "
            f"{len(study.sweep[CROSS_ENTROPY])} settings for cross-entropy alone and {_settings(study)} for each "
            "calibration loss (all of them are in `results.json`). No test digit chose any; the epochs, the ranges "
            "and the augmentation (without noise) were settled in trials that did look at them.",
            "### The same classifiers as guides",
            f"{plan.images} images of each classifier and setting, {plan.steps} DDPM steps; the UNet, the noise and "
            "the labels are the same in every arm. Columns as in the first table; compare within this one only, for "
            "the Fréchet distance grows as images get fewer. A temperature divides the logits, and with them the "
            "gradient: at one and the same scale an overconfident classifier pushes harder. So here is first each "
            "one's Fréchet distance at the best scale of its own, that of the lowest distance to the training digits, "
            "and then every figure at every scale.",
            _best_table(study),
            _guided_table(study),
        ]
    )


def _statistics(runs: Sequence[Row]) -> dict[str, Any]:
    return {
        "mean": asdict(summarise(runs, mean)),
        "std": asdict(summarise(runs, stdev)) if len(runs) > 1 else None,
        "runs": [asdict(run) for run in runs],
    }


def _settings(study: Study) -> int:
    return max(len(points) for points in study.sweep.values())


def _held_out_table(study: Study) -> str:
    lines = [
        "| classifier | setting | smooth ECE ↓ | by chance | Huber ECE | accuracy | NLL | mean confidence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, title in ARMS.items():
        lines.append(f"| {title} | {_setting(study, arm)} | {_cells(study.held_out[arm], _HELD_OUT)} |")
    return "\n".join(lines)


def _setting(study: Study, arm: str) -> str:
    if arm == TEMPERATURE:
        return f"T = {', '.join(f'{temperature:.2f}' for temperature in study.temperatures)}"
    if arm not in study.chosen:
        return "–"
    chosen = study.chosen[arm]
    weight = f", weight {chosen.loss_weight:g}" if LOSSES[arm] else ""
    return f"learning rate {chosen.learning_rate:g}{weight}"


def _best(study: Study, method: Method) -> dict[str, Guided]:
    """Every arm's best scale under one guidance."""
    points = [point for point in study.guided if point.method == method.name]
    return {arm: best_scale([point for point in points if point.arm == arm]) for arm in ARMS}


def _best_table(study: Study) -> str:
    methods = study.plan.methods
    lines = [f"| classifier | {' | '.join(method.title for method in methods)} |", "|---" * (len(methods) + 1) + "|"]
    for arm, title in ARMS.items():
        best = [_best(study, method)[arm] for method in methods]
        cells = [f"{_cells(point.runs, {'frechet': '.2f'})} at {point.scale:g}" for point in best]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _guided_table(study: Study) -> str:
    lines = [
        "| guidance | scale | classifier | Fréchet | precision | recall | class | gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in study.plan.methods:
        points = [point for point in study.guided if point.method == method.name]
        best = _best(study, method)
        for point in sorted(points, key=lambda point: point.scale):
            mark = " (best)" if point is best[point.arm] else ""
            lines.append(
                f"| {method.title} | {point.scale:g} | {ARMS[point.arm]}{mark} | {_cells(point.runs, _GUIDED)} |"
            )
    return "\n".join(lines)


def _cells(runs: Sequence[Row], forms: Mapping[str, str]) -> str:
    """Each figure's mean ± standard deviation over the runs, or its value in the only one."""
    average = summarise(runs, mean)
    spread = summarise(runs, stdev) if len(runs) > 1 else None

    def cell(name: str, form: str) -> str:
        value = format(getattr(average, name), form)
        return value if spread is None else f"{value} ± {format(getattr(spread, name), form)}"

    return " | ".join(cell(name, form) for name, form in forms.items())
