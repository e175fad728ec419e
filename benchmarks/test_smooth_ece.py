"""smooth_ece against the reference package, a binned estimate and what one would write in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from calguide_fast import backends, smooth_ece, use_backend


def installed(name: str) -> ModuleType | None:
    """A peer's package, or nothing: a machine that is lent for its GPU may not have it."""
    return import_module(name) if find_spec(name) is not None else None


relplot, torchmetrics = installed("relplot"), installed("torchmetrics")

SIZES = [1000, 50_000, 1_000_000, 10_000_000]
PEERS = ["relplot", "torch quadrature", "torchmetrics, bins"]
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
    t = torch.linspace(0, 1, math.ceil(4 / sigma) + 1, device=confidence.device)[:, None]
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


def expected(confidence: Tensor, correct: Tensor) -> Tensor:
    """The value of the reference, float64, which takes what a second or two allow."""
    with use_backend("reference"):
        return smooth_ece(confidence.double(), correct).value


@pytest.mark.parametrize(("count", "peer"), cases())
def test_smooth_ece(compare, device, backend, not_measured, count: int, peer: str) -> None:
    confidence, correct = (tensor.to(device) for tensor in sample(count))
    if peer == "relplot":
        if device.type != "cpu":
            not_measured("relplot is NumPy's, and compared on the CPU")
        if relplot is None:
            not_measured("relplot is not installed")
        f, y = confidence.double().numpy(), correct.double().numpy()

        def other(confidence: Tensor, correct: Tensor) -> Tensor:
            return torch.tensor(relplot.smECE(f, y))
    elif peer == "torch quadrature":
        sigma = float(smooth_ece(confidence, correct).bandwidth)

        def other(confidence: Tensor, correct: Tensor) -> Tensor:
            return quadrature(confidence, correct, sigma)
    else:
        if torchmetrics is None:
            not_measured("torchmetrics is not installed")
        binned, target = torchmetrics.functional.classification.binary_calibration_error, correct.long()

        def other(confidence: Tensor, correct: Tensor) -> Tensor:
            return binned(confidence, target, n_bins=15)

    compare(
        f"smooth_ece {count}",
        peer,
        other,
        lambda confidence, correct: smooth_ece(confidence, correct).value,
        (confidence, correct),
        expected=expected(confidence, correct),
        # bins are another estimate
        same_result=peer != "torchmetrics, bins",
        atol=1e-6,
        # relplot's grid and search are good to a few parts in a thousand, four points to a bandwidth to one
        peer_rtol={"relplot": 5e-3, "torch quadrature": 1e-3}.get(peer),
        size=count,
        traffic=confidence.nbytes + correct.nbytes,
        host=count == 1000 and peer == "relplot",
        whole=smooth_ece,
        in_torch=peer != "relplot",
        waits=peer == "torchmetrics, bins",
    )


@pytest.mark.parametrize("by", ["autograd", "ops"])
@pytest.mark.parametrize("count", [pytest.param(count, marks=[pytest.mark.smoke] * (count == 1000)) for count in SIZES])
def test_gradient_over_value(compare, device, backend, count: int, by: str) -> None:
    """The other way round: how many times as long as the value alone the value and its gradient take."""
    inputs = tuple(tensor.to(device) for tensor in sample(count))
    kernels, one = backends.choose(inputs[0], "smooth_ece"), torch.ones((), device=device)

    def value(confidence: Tensor, correct: Tensor) -> Tensor:
        return smooth_ece(confidence, correct).value

    def by_autograd(confidence: Tensor, correct: Tensor) -> Tensor:
        leaf = confidence.detach().requires_grad_()
        return torch.autograd.grad(value(leaf, correct), leaf)[0]

    def by_ops(confidence: Tensor, correct: Tensor) -> Tensor:
        *_, curve = kernels.smooth_ece(confidence, correct, None, 0.0, True)
        return kernels.smooth_ece_gradient(confidence, correct, None, curve, one)

    torch.testing.assert_close(by_autograd(*inputs), by_ops(*inputs), rtol=0, atol=0)
    name, both = {"autograd": ("with its gradient", by_autograd), "ops": ("with its gradient, ops alone", by_ops)}[by]
    options = {"same_result": False, "size": count, "ceiling": MOST_FOR_GRADIENT}
    compare(f"smooth_ece {count}, value", name, both, value, inputs, **options)


@pytest.mark.parametrize("count", [count for count in SIZES if count <= MOST["torch quadrature"]])
def test_gradient(compare, device, backend, count: int) -> None:
    """Value and gradient against autograd's through the quadrature, whose bandwidth somebody has found."""
    confidence, correct = (tensor.to(device) for tensor in sample(count))
    sigma = float(smooth_ece(confidence, correct).bandwidth)

    def of_value(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(confidence: Tensor, correct: Tensor) -> Tensor:
            leaf = confidence.detach().requires_grad_()
            return torch.autograd.grad(value(leaf, correct), leaf)[0]

        return run

    leaf = confidence.double().requires_grad_()
    with use_backend("reference"):
        (wanted,) = torch.autograd.grad(smooth_ece(leaf, correct).value, leaf)
    compare(
        f"smooth_ece {count} with gradient",
        "torch quadrature",
        of_value(lambda confidence, correct: quadrature(confidence, correct, sigma)),
        of_value(lambda confidence, correct: smooth_ece(confidence, correct).value),
        (confidence, correct),
        expected=wanted,
        # at a bandwidth that does not move with the confidences, another gradient
        same_result=False,
        rtol=1e-3,
        atol=1e-3 / count,
        size=count,
        traffic=2 * confidence.nbytes + correct.nbytes,
    )
