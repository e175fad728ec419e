"""Several classifiers that guide as one: by the weighted mean of their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast.guidance import ImageGradient
from calguide_fast.ops.checks import number
from calguide_fast.ops.guidance import GuidanceStats
from calguide_fast.scratch import Scratch


class Member(NamedTuple):
    """A classifier, its share of the mean, and how it wants its input."""

    network: Callable[..., Tensor]
    share: float
    dtype: torch.dtype
    layout: torch.memory_format


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Each member's share of the mean; they add up to 1.

    Args:
        count: of members.
        weights: any numbers that are not negative and not all 0; None for equal ones.

    Raises:
        TypeError, ValueError: not so many weights, or such as cannot be shares.
    """
    if weights is None:
        return [1 / count for _ in range(count)]
    if len(weights) != count:
        raise ValueError(f"classifier_weights has {len(weights)} entries for {count} classifiers")
    numbers = [number(f"classifier_weights[{i}]", weight, low=0.0) for i, weight in enumerate(weights)]
    total = sum(numbers)
    if total == 0:
        raise ValueError(f"classifier_weights={list(weights)!r} must not all be 0")
    return [weight / total for weight in numbers]


def mean_gradient(found: Sequence[ImageGradient], shares: Sequence[float], scratch: Scratch) -> ImageGradient:
    """The gradient of Σ_j share_j S_j, S_j the score of classifier j, and the same mean of each scalar, in float32.

    Averaging scores is a product of experts: of the p_j(y|x) by their geometric mean, where S is a log-probability.

    Args:
        found: what each classifier says.
        shares: of each in the mean.
        scratch: where the mean of several gradients may lie.
    """
    (first, *others), (share, *rest) = found, shares
    if not others:
        return first
    mean = scratch.take("mean", first.gradient, torch.float32, torch.preserve_format)
    # a copy widens, and a product of narrow numbers would round to such
    mean.copy_(first.gradient).mul_(share)
    for other, weight in zip(others, rest):
        mean.add_(scratch.cast("widened", other.gradient, torch.float32), alpha=weight)
    tables = [torch.stack(list(one.stats)) * weight for one, weight in zip(found, shares) if one.stats is not None]
    return ImageGradient(mean, GuidanceStats(*torch.stack(tables).sum(0).float().unbind(0)))
