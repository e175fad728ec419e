"""Fused kernels for classifier guidance of diffusion models: calibrated, regularised, f-divergence guided."""

from __future__ import annotations

import importlib
from typing import Any

from calguide_fast.backends import backend_report, use_backend
from calguide_fast.calibration.losses import HuberECELoss, SmoothECELoss, huber_ece
from calguide_fast.cond_fn import as_cond_fn
from calguide_fast.guidance import Guidance
from calguide_fast.ops.guidance import GuidanceGradient, guidance_gradient, guidance_score
from calguide_fast.ops.smooth_ece import SmoothECE, smooth_ece, smooth_ece_from_logits
from calguide_fast.ops.step import guided_step, predict_x0
from calguide_fast.ops.tilt import tilt_weights
from calguide_fast.sampler import FDivSampler
from calguide_fast.samples import Samples

__version__ = "0.1.0"

__all__ = [
    "FDivSampler",
    "Guidance",
    "GuidanceGradient",
    "HuberECELoss",
    "Samples",
    "SmoothECE",
    "SmoothECELoss",
    "as_cond_fn",
    "backend_report",
    "guidance_gradient",
    "guidance_score",
    "guided_step",
    "huber_ece",
    "predict_x0",
    "smooth_ece",
    "smooth_ece_from_logits",
    "tilt_weights",
    "use_backend",
]

# parts that are reached as attributes, imported or not
_PARTS = ("calibration", "evaluation", "models", "schedule")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
