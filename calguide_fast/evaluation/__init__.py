"""How good are samples? Fréchet distance and precision/recall on features of any network."""

from __future__ import annotations

from calguide_fast.evaluation.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    frechet_distance_from_statistics,
)
from calguide_fast.evaluation.manifold import PrecisionRecall, precision_recall

__all__ = [
    "FeatureStatistics",
    "PrecisionRecall",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "precision_recall",
]
