"""smooth_ece against the reference package, a binned estimate and what one would write in PyTorch."""

from __future__ import annotations

import math

import pytest
import relplot
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from calguide_fast import smooth_ece

SIZES = [1000, 50_000, 1_000_000, 10_000_000]
PEERS = ["relplot", "torch quadrature", "torchmetrics, bins"]
FLOORS = {1000: 100, 50_000: 45, 1_000_000: 180}
MOST = {
    # a call at ten million samples takes it some 15 s, and a row of them minutes
    "relplot": 1_000_000,
    # the pairs of points and samples that it looks at must fit in memory
    "torch quadrature": 50_000,
}
# the value and its gradient together should take at most so many times as long as the value
MOST_FOR_GRADIENT = 2.5


def sample(count: int) -> tuple[Tensor, Tensor]:
    """Confidences of an overconfident classifier, and outcomes."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(count, generator=generator)
    return confidence, torch.rand(count, generator=generator) < confidence**1.3


def quadrature(confidence: Tensor, correct: Tensor, sigma: float) -> Tensor:
    """∫|R_σ| for a bandwidth that somebody has found, on a grid of four points to a bandwidth."""
    t = torch.linspace(0, 1, math.ceil(4 / sigma) + 1)[:, None]
    images = torch.stack([confidence, -confidence, 2 - confidence])[:, None]
    kernel = torch.exp(-0.5 * ((t - images) / sigma) ** 2).sum(0) / (sigma * math.sqrt(2 * math.pi))
    return torch.trapezoid((kernel @ (confidence - correct.float()) / len(confidence)).abs(), t[:, 0])


def cases() -> list:
    return [
        pytest.param(count, peer, id=f"{count}-{peer.replace(' ', '_')}", marks=[pytest.mark.smoke] * (count == 1000))
        for count in SIZES
        for peer in PEERS
        if count <= MOST.get(peer, count)
    ]


@pytest.mark.parametrize(("count", "peer"), cases())
def test_smooth_ece(compare, count: int, peer: str) -> None:
    confidence, correct = sample(count)
    found = smooth_ece(confidence, correct)
    floor = None

    def ours() -> Tensor:
        return smooth_ece(confidence, correct).value

    if peer == "relplot":
        f, y = confidence.double().numpy(), correct.double().numpy()
        floor = FLOORS[count]

        def other() -> float:
            return relplot.smECE(f, y)

        # its own grid and search are good to a few parts in a thousand
        assert other() == pytest.approx(float(found.value), rel=5e-3)
    elif peer == "torch quadrature":
        sigma = float(found.bandwidth)

        def other() -> Tensor:
            return quadrature(confidence, correct, sigma)

        assert float(other()) == pytest.approx(float(found.value), rel=1e-3)
    else:
        target = correct.long()

        def other() -> Tensor:
            return binary_calibration_error(confidence, target, n_bins=15)

    compare(f"smooth_ece {count}", peer, other, ours, floor, count)


@pytest.mark.parametrize("count", [pytest.param(count, marks=[pytest.mark.smoke] * (count == 1000)) for count in SIZES])
def test_gradient_over_value(compare, count: int) -> None:
    """The other way round: how many times as long as the value alone the value and its gradient take."""
    confidence, correct = sample(count)
    leaf = confidence.clone().requires_grad_()

    def both() -> Tensor:
        return torch.autograd.grad(smooth_ece(leaf, correct).value, leaf)[0]

    def value() -> Tensor:
        return smooth_ece(confidence, correct).value

    compare(f"smooth_ece {count}, value", "with its gradient", both, value, None, count, MOST_FOR_GRADIENT)


@pytest.mark.parametrize("count", [count for count in SIZES if count <= MOST["torch quadrature"]])
def test_gradient(compare, count: int) -> None:
    """Value and gradient against autograd's through the quadrature, whose bandwidth somebody has found."""
    confidence, correct = sample(count)
    sigma = float(smooth_ece(confidence, correct).bandwidth)
    leaf = confidence.clone().requires_grad_()

    def ours() -> Tensor:
        return torch.autograd.grad(smooth_ece(leaf, correct).value, leaf)[0]

    def other() -> Tensor:
        return torch.autograd.grad(quadrature(leaf, correct, sigma), leaf)[0]

    compare(f"smooth_ece {count} with gradient", "torch quadrature", other, ours, None, count)
