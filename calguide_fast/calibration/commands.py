"""What the command line's ``reliability`` and ``calibrate`` do: files in, figures and pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from calguide_fast.calibration.diagrams import calibration_diagram, reliability_diagram
from calguide_fast.calibration.files import Predictions, read_predictions
from calguide_fast.calibration.predictions import measure_calibration
from calguide_fast.calibration.reliability import reliability_curve
from calguide_fast.calibration.temperature import TemperatureScaling
from calguide_fast.calibration.vector import VectorScaling

METHODS = ("temperature", "vector")


def report_reliability(path: Path, picture: Path | None = None, bandwidth: float | None = None) -> dict[str, Any]:
    """Measure a file's smooth ECE, accuracy and mean confidence, and draw the curve if asked for.

    Raises FileNotFoundError, TypeError or ValueError as :func:`read_predictions` and :func:`reliability_curve`.
    """
    found = read_predictions(path)
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


def report_calibration(
    path: Path, method: str = "temperature", test_path: Path | None = None, picture: Path | None = None
) -> dict[str, Any]:
    """Fit a scaling to a file's logits and measure it there and, if there is one, on a second file that is new to it.

    Raises FileNotFoundError, TypeError or ValueError as :func:`read_predictions` and the scalings' ``fit``.
    """
    logits, labels = _logits(path, read_predictions(path))
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
    if test_path is not None:
        logits, labels = _logits(test_path, read_predictions(test_path))
        figures["tested_on"] = _before_and_after(logits, labels, scaling)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        calibration_diagram(logits, scaling(logits), labels, method, path=picture)
    return figures


def _logits(path: Path, found: Predictions) -> tuple[Tensor, Tensor]:
    if found.logits is None or found.labels is None:
        raise ValueError(f"{path} holds confidences alone; to calibrate, logits or probabilities and labels are needed")
    return found.logits, found.labels


def _before_and_after(
    logits: Tensor, labels: Tensor, scaling: TemperatureScaling | VectorScaling
) -> dict[str, dict[str, float]]:
    return {
        "before": measure_calibration(logits, labels)._asdict(),
        "after": measure_calibration(scaling(logits), labels)._asdict(),
    }
