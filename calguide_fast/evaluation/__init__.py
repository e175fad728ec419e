"""How good are samples? Fréchet distance, precision/recall, density/coverage and Inception score, of any network."""

from __future__ import annotations

from calguide_fast.evaluation.evaluator import Evaluation, evaluate
from calguide_fast.evaluation.extractors import ImageFeatures
from calguide_fast.evaluation.frechet import frechet_distance, frechet_distance_from_statistics
from calguide_fast.evaluation.inception import Inception
from calguide_fast.evaluation.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from calguide_fast.evaluation.score import StreamingInceptionScore, inception_score
from calguide_fast.evaluation.statistics import FeatureStatistics, StreamingStatistics, feature_statistics

__all__ = [
    "DensityCoverage",
    "Evaluation",
    "FeatureStatistics",
    "ImageFeatures",
    "Inception",
    "PrecisionRecall",
    "StreamingInceptionScore",
    "StreamingStatistics",
    "density_coverage",
    "evaluate",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "inception_score",
    "precision_recall",
]
