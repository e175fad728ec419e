"""Is a classifier as sure as it is right? Measures, losses, repairs and pictures of calibration."""

from __future__ import annotations

from calguide_fast.calibration.diagrams import calibration_diagram, noise_level_diagram, reliability_diagram
from calguide_fast.calibration.fine_tune import Epoch, fine_tune
from calguide_fast.calibration.losses import HuberECELoss, SmoothECELoss, huber_ece
from calguide_fast.calibration.noise_level import NoiseLevelCalibration, calibration_by_noise_level
from calguide_fast.calibration.predictions import Calibration, TopLabel, measure_calibration, top_label
from calguide_fast.calibration.reliability import ReliabilityCurve, reliability_curve
from calguide_fast.calibration.temperature import CalibratedClassifier, TemperatureScaling
from calguide_fast.calibration.vector import VectorScaling

__all__ = [
    "CalibratedClassifier",
    "Calibration",
    "Epoch",
    "HuberECELoss",
    "NoiseLevelCalibration",
    "ReliabilityCurve",
    "SmoothECELoss",
    "TemperatureScaling",
    "TopLabel",
    "VectorScaling",
    "calibration_by_noise_level",
    "calibration_diagram",
    "fine_tune",
    "huber_ece",
    "measure_calibration",
    "noise_level_diagram",
    "reliability_curve",
    "reliability_diagram",
    "top_label",
]
