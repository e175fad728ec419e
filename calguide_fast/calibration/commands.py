"""What the command line's ``reliability`` and ``calibrate`` do: predictions in, figures and pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from calguide_fast.calibration.diagrams import calibration_diagram, noise_level_diagram, reliability_diagram
from calguide_fast.calibration.files import Predictions
from calguide_fast.calibration.inference import Classified
from calguide_fast.calibration.noise_level import measure_by_noise_level
from calguide_fast.calibration.predictions import measure_calibration
from calguide_fast.calibration.reliability import reliability_curve
from calguide_fast.calibration.temperature import TemperatureScaling
from calguide_fast.calibration.vector import VectorScaling
from calguide_fast.schedule import Schedule

METHODS = ("temperature", "vector")


def report_reliability(
    found: Predictions, picture: Path | None = None, bandwidth: float | None = None
) -> dict[str, Any]:
    """Measure smooth ECE, accuracy and mean confidence of predictions, and draw the curve if asked for.

    Raises TypeError or ValueError as :func:`reliability_curve`.
    """
    curve = reliability_curve(found.confidence, found.correct, bandwidth)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        reliability_diagram(curve, path=picture)
    return {
        "smooth_ece": curve.smooth_ece,
        "bandwidth": curve.bandwidth,
        "accuracy": curve.mean_accuracy,
        "confidence": curve.mean_confidence,
        "samples": curve.samples,
    }


def report_noise_levels(
    found: Classified, schedule: Schedule, picture: Path | None = None, bandwidth: float | None = None
) -> dict[str, Any]:
    """Measure the predictions of noised images at each level, and draw the figures over the levels if asked for."""
    levels = measure_by_noise_level(list(found.logits), found.labels, schedule, found.timesteps, bandwidth)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        noise_level_diagram(levels, path=picture)
    columns = [column.tolist() for column in levels]
    names = ("timestep", "sigma", *levels._fields[2:])
    return {"noise_levels": [dict(zip(names, row)) for row in zip(*columns)], "samples": len(found.labels)}


def report_calibration(
    found: Predictions, method: str = "temperature", test: Predictions | None = None, picture: Path | None = None
) -> dict[str, Any]:
    """Fit a scaling to logits and measure it there and, if there are any, on predictions that are new to it.

    Raises TypeError or ValueError as the scalings' ``fit``, or where there are confidences alone.
    """
    logits, labels = _logits(found)
    scaling: TemperatureScaling | VectorScaling
    if method == "temperature":
        scaling = TemperatureScaling().fit(logits, labels)
        figures: dict[str, Any] = {
            "method": method,
            "temperature": scaling.temperature.item(),
            "at_bound": scaling.at_bound,
        }
    elif method == "vector":
        scaling = VectorScaling(logits.shape[1]).fit(logits, labels)
        figures = {
            "method": method,
            "weight": scaling.weight.tolist(),
            "bias": scaling.bias.tolist(),
            "converged": scaling.converged,
        }
    else:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}")
    figures["fitted_on"] = _before_and_after(logits, labels, scaling)
    if test is not None:
        logits, labels = _logits(test)
        figures["tested_on"] = _before_and_after(logits, labels, scaling)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        calibration_diagram(logits, scaling(logits), labels, method, path=picture)
    return figures


def _logits(found: Predictions) -> tuple[Tensor, Tensor]:
    if found.logits is None or found.labels is None:
        raise ValueError(
            "the file holds confidences alone; to calibrate, logits or probabilities and labels are needed"
        )
    return found.logits, found.labels


def _before_and_after(
    logits: Tensor, labels: Tensor, scaling: TemperatureScaling | VectorScaling
) -> dict[str, dict[str, float]]:
    return {
        "before": measure_calibration(logits, labels)._asdict(),
        "after": measure_calibration(scaling(logits), labels)._asdict(),
    }
