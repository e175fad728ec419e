"""Do samples look real, and is all that is real sampled? Precision and recall, density and coverage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width

BLOCK = 2048


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float  # of fake samples that lie on the manifold of the real ones
    recall: float  # of real samples that lie on the manifold of the fake ones


class DensityCoverage(NamedTuple):
    """How many real neighbourhoods a fake sample is in, and how many of them hold one."""

    density: float  # in 0 .. N/k, 1 on average where fake samples are as real ones
    coverage: float  # a share in [0, 1]


def precision_recall(
    real: ArrayLike, fake: ArrayLike, k: int = 3, block: int = BLOCK, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Precision and recall of features `fake` (M, D) against `real` (N, D).

    A manifold is the union of balls around its samples, each reaching to that sample's k-th nearest neighbour of the
    same set. Both figures depend on N and M: compare only values computed from equally many samples. Distances are
    taken in float64, `block` by `block`, on `device`. Source: Kynkäänniemi et al., 2019.

    Raises ValueError for k < 1, k or fewer samples, widths that differ, or values that are not finite.
    """
    real, fake = _centred(real, fake, k, block, device, fake_at_least=k + 1)
    real_radii, fake_radii = _squared_radii(real, k, block), _squared_radii(fake, k, block)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for rows in _blocks(fake, block):
        for columns in _blocks(real, block):
            distances = _squared_distances(fake[rows], real[columns])
            fake_inside[rows] |= (distances <= real_radii[columns]).any(1)
            real_inside[columns] |= (distances <= fake_radii[rows, None]).any(0)
    return PrecisionRecall(_share(fake_inside), _share(real_inside))


def density_coverage(
    real: ArrayLike, fake: ArrayLike, k: int = 5, block: int = BLOCK, device: torch.device | str = "cpu"
) -> DensityCoverage:
    """Density and coverage of features `fake` (M, D) against `real` (N, D).

    With a ball around each real sample, reaching to its k-th nearest real neighbour, density is the number of balls
    that hold a fake sample, averaged over the fake samples and divided by k; coverage is the share of the balls that
    hold any. A sample on the surface is inside. Distances are taken in float64, `block` by `block`, on `device`.
    Source: Naeem et al., 2020 (arXiv 2002.09797), whose k is 5.

    Raises ValueError for k < 1, k or fewer real samples, no fake ones, widths that differ, or values that are not
    finite.
    """
    real, fake = _centred(real, fake, k, block, device, fake_at_least=1)
    radii = _squared_radii(real, k, block)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    held = 0
    for rows in _blocks(fake, block):
        for columns in _blocks(real, block):
            inside = _squared_distances(fake[rows], real[columns]) <= radii[columns]
            covered[columns] |= inside.any(0)
            held += int(inside.sum().item())
    return DensityCoverage(held / (k * len(fake)), _share(covered))


def _centred(
    real: ArrayLike, fake: ArrayLike, k: int, block: int, device: torch.device | str, fake_at_least: int
) -> tuple[Tensor, Tensor]:
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, got k={k} and block={block}")
    real = as_features(real, "real", at_least=k + 1, device=device)
    fake = as_features(fake, "fake", at_least=fake_at_least, device=device)
    check_same_width(real, fake, "real", "fake")
    # distances do not change with the origin, but cancellation does: centre before expanding |a − b|²
    centre = real.mean(0)
    return real - centre, fake - centre


def _blocks(samples: Tensor, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, len(samples), block)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    distances = torch.addmm(squares, a, b.T, alpha=-2)
    # what rounding leaves of the distance between equal points counts as zero
    return distances.masked_fill_(distances <= squares.mul_(1e-13), 0)


def _squared_radii(samples: Tensor, k: int, block: int) -> Tensor:
    """Squared distance (N,) of each sample to its k-th nearest neighbour."""
    radii = []
    for rows in _blocks(samples, block):
        nearest = samples.new_empty(len(samples[rows]), 0)  # [rows, at most k], squared
        for columns in _blocks(samples, block):
            distances = _squared_distances(samples[rows], samples[columns])
            if rows == columns:
                distances.fill_diagonal_(torch.inf)  # a sample is not its own neighbour
            nearest = _smallest(torch.cat([nearest, _smallest(distances, k)], 1), k)
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _smallest(values: Tensor, k: int) -> Tensor:
    """The k smallest of each row, or all."""
    return values.topk(min(k, values.shape[1]), dim=1, largest=False, sorted=False).values


def _share(inside: Tensor) -> float:
    return inside.double().mean().item()
