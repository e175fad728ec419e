"""top_label against softmax, max and comparison in PyTorch, and with the smooth ECE that is made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calguide_fast import guidance_gradient, smooth_ece, smooth_ece_from_logits, use_backend
from calguide_fast.ops.top_label import top_label

SHAPES = [(256, 1000), (50_000, 10), (50_000, 1000)]
PEERS = ["eager", "torch.compile"]


@functools.cache
def sample(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Logits of an overconfident classifier, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.multinomial((0.7 * logits).softmax(1), 1, generator=generator).squeeze(1)
    return logits, labels


def composed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, top = torch.softmax(logits, 1).max(1)
    return confidence, top == labels


def cases(*peers: str) -> list:
    return [
        pytest.param(shape, peer, id=f"{shape[0]}x{shape[1]}-{peer}", marks=[pytest.mark.smoke] * smoke(shape, peer))
        for shape in SHAPES
        for peer in peers
    ]


def smoke(shape: tuple[int, int], peer: str) -> bool:
    return shape == SHAPES[0] and peer != "torch.compile"


def peers_function(peer: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return composed if peer == "eager" else torch.compile(composed, fullgraph=True, dynamic=False)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    return top_label(logits, labels)[0]


def mean_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    return top_label(logits, labels)[0].mean()


def calibration_error(logits: Tensor, labels: Tensor) -> Tensor:
    return smooth_ece_from_logits(logits, labels).value


# the largest takes seconds
@functools.cache
def reference(shape: tuple[int, int], function: Callable[[Tensor, Tensor], Tensor], gradient: bool = False) -> Tensor:
    """What the reference finds, float64: the function's value, or its gradient in the logits."""
    logits, labels = sample(shape)
    with use_backend("reference"):
        return (pulled(function) if gradient else function)(logits.double(), labels)


def pulled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient in the logits of a scalar of them."""

    def run(logits: Tensor, labels: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, labels), leaf)[0]

    return run


@pytest.mark.parametrize(("shape", "peer"), cases(*PEERS, "guidance"))
def test_top_label(compare, device, backend, shape: tuple[int, int], peer: str) -> None:
    logits, labels = (tensor.to(device) for tensor in sample(shape))
    if peer == "guidance":
        out = torch.empty_like(logits)

        def other(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return tuple(guidance_gradient(logits, labels, "reverse_kl", marginal_temperature=1.0, out=out))
    else:
        other = peers_function(peer)
        assert torch.equal(other(logits, labels)[1], top_label(logits, labels)[2])
    compare(
        f"top_label {shape[0]}x{shape[1]}",
        peer,
        other,
        top_label,
        (logits, labels),
        expected=(reference(shape, confidence).to(device),),
        same_result=peer != "guidance",
        size=logits.numel(),
        # the logits, a label and its three results
        traffic=logits.nbytes + (8 + 4 + 8 + 1) * len(logits),
        host=shape == SHAPES[0] and peer == "eager",
    )


@pytest.mark.parametrize(("shape", "peer"), cases(*PEERS))
def test_top_label_and_its_gradient(compare, device, backend, shape: tuple[int, int], peer: str) -> None:
    logits, labels = (tensor.to(device) for tensor in sample(shape))
    function = peers_function(peer)
    compare(
        f"top_label {shape[0]}x{shape[1]}, gradient",
        peer,
        pulled(lambda logits, labels: function(logits, labels)[0].mean()),
        pulled(mean_confidence),
        (logits, labels),
        expected=reference(shape, mean_confidence, gradient=True).to(device),
        atol=1e-6,
        size=logits.numel(),
        traffic=3 * logits.nbytes,
    )


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize(("shape", "peer"), cases("eager"))
def test_smooth_ece_from_logits(compare, device, backend, shape: tuple[int, int], peer: str, gradient: bool) -> None:
    """Ours in both, after PyTorch's own softmax, max and comparison or in one go."""
    logits, labels = (tensor.to(device) for tensor in sample(shape))

    def other(logits: Tensor, labels: Tensor) -> Tensor:
        return smooth_ece(*composed(logits, labels)).value

    compare(
        f"smooth_ece_from_logits {shape[0]}x{shape[1]}{', gradient' * gradient}",
        peer,
        pulled(other) if gradient else other,
        pulled(calibration_error) if gradient else calibration_error,
        (logits, labels),
        expected=reference(shape, calibration_error, gradient).to(device),
        rtol=1e-3,
        atol=1e-6,
        size=logits.numel(),
        traffic=(3 if gradient else 1) * logits.nbytes,
    )
