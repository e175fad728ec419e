"""guidance_gradient against what one would write in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import liger
import pytest
import torch
from peers import ALPHA, EPSILON, TAU, autograd, closed_form, reduced
from torch import Tensor

from calguide_fast import guidance_gradient, use_backend
from calguide_fast.ops.guidance import GuidanceGradient

SHAPES = [(8, 10), (16, 1000), (64, 1000), (256, 1000), (64, 21843)]
DIVERGENCES = ["reverse_kl", "forward_kl", "js"]
PEERS = ["eager closed form", "eager autograd", "torch.compile", "torch.softmax", "eager reduced"]
# compiling takes seconds: the better form is compiled where it matters
REDUCED = "torch.compile, reduced"
REDUCED_SHAPES = [(64, 1000), (64, 21843)]
# float64 inside, for scale
REFERENCE = "our reference, float64"


def cases() -> list:
    rows = [(divergence, shape, peer) for divergence in DIVERGENCES for shape in SHAPES for peer in PEERS]
    rows += [(divergence, shape, REDUCED) for divergence in DIVERGENCES for shape in REDUCED_SHAPES]
    rows += [(divergence, (64, 1000), REFERENCE) for divergence in DIVERGENCES]
    return [
        pytest.param(
            divergence,
            shape,
            peer,
            id=f"{divergence}-{shape[0]}x{shape[1]}-{peer.replace(' ', '_')}",
            marks=[pytest.mark.smoke] if shape in SHAPES[:2] and "compile" not in peer else [],
        )
        for divergence, shape, peer in rows
    ]


def peers_function(peer: str, divergence: str) -> Callable[..., tuple[Tensor, Tensor]]:
    form = autograd if peer == "eager autograd" else reduced if "reduced" in peer else closed_form
    function = form(divergence)
    return torch.compile(function, fullgraph=True, dynamic=False) if "compile" in peer else function


def sample(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    return logits.to(device, dtype), labels.to(device)


def expected(logits: Tensor, labels: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Gradient and score of the reference, float64."""
    with use_backend("reference"):
        found = guidance_gradient(logits.double(), labels, divergence, ALPHA, EPSILON, 1.0, TAU)
    return found.grad, found.score


def measure(
    compare: Callable[..., None],
    backend: str,
    device: torch.device,
    divergence: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    peer: str,
    **options: object,
) -> None:
    logits, labels = sample(shape, dtype, device)
    # a large output is reused, as the sampler does: a fresh one costs page faults
    out = torch.empty_like(logits) if logits.numel() > 2**20 else None

    def ours(logits: Tensor, labels: Tensor, out: Tensor | None) -> GuidanceGradient:
        return guidance_gradient(logits, labels, divergence, ALPHA, EPSILON, 1.0, TAU, out=out)

    other: Callable[..., object]
    if peer == "torch.softmax":

        def other(logits: Tensor, labels: Tensor, out: Tensor | None) -> Tensor:
            return torch.softmax(logits, 1)
    elif peer == REFERENCE:

        def other(logits: Tensor, labels: Tensor, out: Tensor | None) -> GuidanceGradient:
            with use_backend("reference"):
                return ours(logits, labels, out)
    else:
        function = peers_function(peer, divergence)

        def other(logits: Tensor, labels: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
            return function(logits, labels)

    narrow = dtype != torch.float32
    compare(
        f"guidance {divergence} {shape[0]}x{shape[1]}{' bf16' * narrow}{f' ({backend})' * (device.type == 'cuda')}",
        peer,
        other,
        ours,
        (logits, labels, out),
        expected=expected(logits, labels, divergence),
        same_result=peer != "torch.softmax",
        rtol=2e-2 if narrow else 1e-4,
        atol=4e-2 if narrow else 1e-4,
        size=logits.numel(),
        traffic=2 * logits.nbytes,
        # the reference looks at the labels
        waits=peer == REFERENCE,
        **options,
    )


@pytest.mark.parametrize(("divergence", "shape", "peer"), cases())
def test_guidance_gradient(compare, device, backend, divergence: str, shape: tuple[int, int], peer: str) -> None:
    # where the kernel is short enough for what is around it to be told from noise
    host = shape in SHAPES[:2] and peer == "eager closed form"
    measure(compare, backend, device, divergence, shape, torch.float32, peer, host=host)


@pytest.mark.parametrize("peer", [PEERS[0], PEERS[1], PEERS[4], PEERS[2]])
@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_bfloat16(compare, device, backend, divergence: str, peer: str) -> None:
    measure(compare, backend, device, divergence, (256, 1000), torch.bfloat16, peer)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(64, 1000), (256, 1000), (64, 21843)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("divergence", liger.DIVERGENCES)
def test_liger(compare, device, backend, not_measured, divergence: str, shape: tuple[int, int]) -> None:
    if reason := liger.missing(device):
        not_measured(reason)
    logits, labels = sample(shape, torch.float32, device)

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return guidance_gradient(logits, labels, divergence, ALPHA, EPSILON, 1.0, TAU).grad

    group = f"guidance {divergence} {shape[0]}x{shape[1]} ({backend})"
    wanted = expected(logits, labels, divergence)[0]
    options = {"expected": wanted, "atol": 1e-4, "size": logits.numel(), "traffic": 2 * logits.nbytes, "waits": True}
    compare(group, "Liger-Kernel", liger.gradient(divergence), ours, (logits, labels), **options)
