"""top_label against softmax, max and comparison in PyTorch, and with the smooth ECE that is made of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calguide_fast import guidance_gradient, smooth_ece, smooth_ece_from_logits
from calguide_fast.ops.top_label import top_label

SHAPES = [(256, 1000), (50_000, 10), (50_000, 1000)]
PEERS = ["eager", "torch.compile"]
# at most 1.2 times as long as the guidance, which takes as many exponentials and writes a gradient, too
LEAST_OF_GUIDANCE = 1 / 1.2


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


@pytest.mark.parametrize(("shape", "peer"), cases(*PEERS, "guidance"))
def test_top_label(compare, shape: tuple[int, int], peer: str) -> None:
    logits, labels = sample(shape)

    def ours() -> tuple[Tensor, ...]:
        return top_label(logits, labels)

    if peer == "guidance":
        out = torch.empty_like(logits)

        def other():
            return guidance_gradient(logits, labels, "reverse_kl", marginal_temperature=1.0, out=out)
    else:
        function = peers_function(peer)

        def other():
            return function(logits, labels)

        confidence, _, correct = ours()
        torch.testing.assert_close(other()[0], confidence, rtol=1e-5, atol=1e-6)
        assert torch.equal(other()[1], correct)
    floor = LEAST_OF_GUIDANCE if peer == "guidance" else None
    compare(f"top_label {shape[0]}x{shape[1]}", peer, other, ours, floor, logits.numel())


@pytest.mark.parametrize(("shape", "peer"), cases(*PEERS))
def test_top_label_and_its_gradient(compare, shape: tuple[int, int], peer: str) -> None:
    logits, labels = sample(shape)
    logits.requires_grad_()
    function = peers_function(peer)

    def pulled(function) -> Tensor:
        return torch.autograd.grad(function(logits, labels)[0].mean(), logits)[0]

    torch.testing.assert_close(pulled(function), pulled(top_label), rtol=1e-4, atol=1e-6)
    group = f"top_label {shape[0]}x{shape[1]}, gradient"
    compare(group, peer, lambda: pulled(function), lambda: pulled(top_label), None, logits.numel())


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize(("shape", "peer"), cases("eager"))
def test_smooth_ece_from_logits(compare, shape: tuple[int, int], peer: str, gradient: bool) -> None:
    """Ours in both, after PyTorch's own softmax, max and comparison or in one go."""
    logits, labels = sample(shape)
    logits.requires_grad_(gradient)

    def measured(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0] if gradient else value

    def other() -> Tensor:
        return measured(smooth_ece(*composed(logits, labels)).value)

    def ours() -> Tensor:
        return measured(smooth_ece_from_logits(logits, labels).value)

    torch.testing.assert_close(other(), ours(), rtol=1e-3, atol=1e-6)
    group = f"smooth_ece_from_logits {shape[0]}x{shape[1]}{', gradient' * gradient}"
    compare(group, peer, other, ours, None, logits.numel())
