"""Improved precision and recall: do samples look real, and is all that is real sampled?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float  # of fake samples that lie on the manifold of the real ones
    recall: float  # of real samples that lie on the manifold of the fake ones


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3, block: int = 4096) -> PrecisionRecall:
    """Precision and recall of features `fake` (M, D) against `real` (N, D).

    A manifold is the union of balls around its samples, each reaching to that sample's k-th nearest neighbour of the
    same set. Both figures depend on N and M: compare only values computed from equally many samples. Distances are
    taken `block` rows at a time. Source: Kynkäänniemi et al., 2019.

    Raises ValueError for k < 1, k or fewer samples, widths that differ, or values that are not finite.
    """
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, got k={k} and block={block}")
    real = as_features(real, "real", at_least=k + 1)
    fake = as_features(fake, "fake", at_least=k + 1)
    check_same_width(real, fake, "real", "fake")

    # distances do not change with the origin, but cancellation does: centre before expanding |a − b|²
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(
        precision=_share_inside(fake, real, _squared_radii(real, k, block), block),
        recall=_share_inside(real, fake, _squared_radii(fake, k, block), block),
    )


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    distances = torch.addmm(squares, a, b.T, alpha=-2)
    # what rounding leaves of the distance between equal points counts as zero
    return torch.where(distances > 1e-13 * squares, distances, torch.zeros_like(distances))


def _squared_radii(samples: torch.Tensor, k: int, block: int) -> torch.Tensor:
    radii = []
    for start in range(0, len(samples), block):
        distances = _squared_distances(samples[start : start + block], samples)
        rows = torch.arange(len(distances))
        distances[rows, rows + start] = torch.inf  # a sample is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor, block: int) -> float:
    inside = [
        (_squared_distances(points[start : start + block], centres) <= squared_radii).any(1)
        for start in range(0, len(points), block)
    ]
    return torch.cat(inside).double().mean().item()
