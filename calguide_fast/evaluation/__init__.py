"""How good are samples? Fréchet distance, precision/recall, density/coverage and Inception score, of any network."""

from __future__ import annotations

from calguide_fast.evaluation.frechet import frechet_distance, frechet_distance_from_statistics
from calguide_fast.evaluation.inception_score import StreamingInceptionScore, inception_score
from calguide_fast.evaluation.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from calguide_fast.evaluation.statistics import FeatureStatistics, StreamingStatistics, feature_statistics

__all__ = [
    "DensityCoverage",
    "FeatureStatistics",
    "PrecisionRecall",
    "StreamingInceptionScore",
    "StreamingStatistics",
    "density_coverage",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "inception_score",
    "precision_recall",
]
