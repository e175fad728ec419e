"""Mean and covariance of features, from a table or batch by batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width


class FeatureStatistics(NamedTuple):
    """Mean and unbiased covariance of features, both float64."""

    mu: torch.Tensor  # [D]
    sigma: torch.Tensor  # [D, D]


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D) of `features` (N, D).

    Raises ValueError for fewer than two samples, another shape, or values that are not finite.
    """
    table = as_features(features, "features", at_least=2)
    return StreamingStatistics().update(table).result()


class StreamingStatistics:
    """Mean and covariance of features that come in batches, in float64 and in memory that does not grow.

    Each batch's own moments are merged into those of the batches before, which loses no digits where the mean is large
    beside the spread. Source: Chan, Golub & LeVeque, 1982.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None  # [D]
        self._scatter: Tensor | None = None  # [D, D], the sum of centred outer products

    @property
    def width(self) -> int:
        """D, or 0 before the first batch."""
        return 0 if self._mean is None else len(self._mean)

    def update(self, features: ArrayLike) -> StreamingStatistics:
        """Take in a batch (B, D), on the device where it is; returns itself.

        Raises ValueError for another shape, another width than before, or values that are not finite.
        """
        batch = as_features(features, "features", at_least=1, device=None)
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter = batch.new_zeros(batch.shape[1]), batch.new_zeros(batch.shape[1], batch.shape[1])
        check_same_width(batch, self._mean, "a batch of features", "the batch before")
        total = self.count + len(batch)
        mean = batch.mean(0)
        step = mean - self._mean
        # the means' own scatter is one more row of the product
        rows = torch.cat([batch - mean, math.sqrt(self.count * len(batch) / total) * step[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean += step * (len(batch) / total)
        self.count = total
        return self

    def result(self) -> FeatureStatistics:
        """Mean and unbiased covariance, on the CPU.

        Raises ValueError where fewer than two samples were taken in.
        """
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ValueError(f"statistics of {self.count} samples were asked for, at least 2 are needed")
        return FeatureStatistics(self._mean.cpu(), (self._scatter / (self.count - 1)).cpu())
