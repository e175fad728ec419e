"""The ops at sizes that fill a GPU, against what one would write in PyTorch, a copy, and an empty kernel."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import liger
import peers
import pytest
import torch
from gpu_targets import COEFFICIENTS, SCALE, TARGETS, Target
from timing import BLOCKS, clock_of
from torch import Tensor

from calguide_fast import guidance_gradient, smooth_ece, use_backend
from calguide_fast.ops.noise import sampling_noise

LARGE = "sizes that fill a GPU need one"
LIGER = "Liger-Kernel"
PEERS = {
    "guidance": ["eager reduced", "torch.compile, reduced", LIGER],
    "guided_step": ["eager", "torch.compile"],
    "smooth_ece": ["15 bins"],
}
# where launches are most of it, and where samples are
GRADIENT_SIZES = (100_000, 10_000_000)


def cases() -> list:
    return [
        pytest.param(target, peer, id=f"{target.name}-{peer}".replace(" ", "_"))
        for target in TARGETS
        for peer in PEERS[target.op]
    ]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once for both backends of ours."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@functools.cache
def step(drawing: bool) -> Callable[..., Tensor]:
    of = peers.ddpm_step(COEFFICIENTS.tolist(), SCALE)
    return (lambda x_t, output, gradient: of(x_t, output, gradient, torch.randn_like(x_t))) if drawing else of


@functools.cache
def reduced(divergence: str) -> Callable[..., Any]:
    return peers.reduced(divergence)


def bins(confidence: Tensor, correct: Tensor) -> Tensor:
    """The binned calibration error: another estimate, for scale."""
    index = (15 * confidence).long().clamp(max=14)
    total = torch.zeros(15, device=confidence.device).index_add_(0, index, confidence - correct.float())
    return total.abs().sum() / len(confidence)


def peers_call(target: Target, peer: str) -> Callable[..., Any]:
    """The peer as a function of the target's inputs."""
    if target.op == "guidance":
        divergence = target.name.split()[1]
        if peer == LIGER:
            function = liger.gradient(divergence)
        else:
            function = compiled(reduced(divergence)) if "compile" in peer else reduced(divergence)
        return lambda logits, labels, out: function(logits, labels)
    if target.op == "guided_step":
        function = compiled(step(True)) if "compile" in peer else step(True)
        return lambda x_t, output, gradient, seeds, coefficients, out: function(x_t, output, gradient)
    return bins


@functools.cache
def expected(target: Target, device: torch.device) -> tuple[Tensor, ...] | Tensor:
    """What ours must equal, in float64: the same inputs every time, so it is worked out once."""
    inputs = target.inputs(device)
    if target.op == "guidance":
        logits, labels, _ = inputs
        # rows enough to show a mistake in any of them, and few enough for float64
        some = slice(None, None, max(1, len(logits) // 256))
        with use_backend("reference"):
            divergence = target.name.split()[1]
            found = guidance_gradient(
                logits[some].double(), labels[some], divergence, peers.ALPHA, peers.EPSILON, 1.0, peers.TAU
            )
        return found.grad, found.score
    if target.op == "guided_step":
        x_t, output, gradient, seeds, *_ = inputs
        with use_backend("reference"):
            z = sampling_noise(seeds, x_t.shape[1:], int(COEFFICIENTS[14]))
        return step(False)(x_t.double(), output.double(), gradient.double(), z.double())
    confidence, correct = inputs
    with use_backend("cpu"):
        return smooth_ece(confidence.cpu().double(), correct.cpu()).value.to(confidence.device)


def comparable(target: Target, result: Any) -> Any:
    """What of a result `expected` is of."""
    if target.op != "guidance":
        return result
    some = slice(None, None, max(1, len(result.grad) // 256))
    return result.grad[some], result.score[some]


@pytest.mark.parametrize(("target", "peer"), cases())
def test_target(compare, device, backend, not_measured, target: Target, peer: str) -> None:
    if device.type != "cuda":
        not_measured(LARGE)
    if peer == LIGER and (reason := liger.missing(device)):
        not_measured(reason)
    inputs = target.inputs(device)
    wanted = expected(target, device)
    found = comparable(target, target.call(*inputs))
    tolerance = {"guidance": 1e-4, "guided_step": 1e-5, "smooth_ece": 1e-6}[target.op]
    for one, other in zip(*((each,) if isinstance(each, Tensor) else each for each in (found, wanted))):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    del found, wanted
    compare(
        f"{target.name} ({backend})",
        peer,
        peers_call(target, peer),
        target.call,
        inputs,
        # ours is checked above; noise of another generator's, and bins, are other results
        same_result=target.op == "guidance",
        size=target.elements,
        traffic=target.traffic,
        host=peer == PEERS[target.op][0],
        # as in test_guidance.py: nobody promises that no call of it waits
        waits=peer == LIGER,
        predicted_us=target.predicted_us[("cuda", "triton").index(backend)],
        launches=target.launches if backend == "cuda" else None,
        aim_us=target.most_us,
        aim_share=target.share,
    )


@pytest.mark.parametrize("target", [t for t in TARGETS if t.op == "smooth_ece" and t.elements in GRADIENT_SIZES])
def test_gradient_over_value(compare, device, backend, not_measured, target: Target) -> None:
    """The other way round: how many times as long as the value alone the value and its gradient take."""
    if device.type != "cuda":
        not_measured(LARGE)

    def both(confidence: Tensor, correct: Tensor) -> Tensor:
        leaf = confidence.detach().requires_grad_()
        return torch.autograd.grad(smooth_ece(leaf, correct).value, leaf)[0]

    inputs = target.inputs(device)
    group = f"{target.name}, value ({backend})"
    options = {"same_result": False, "size": target.elements, "ceiling": 2.5, "waits": True}
    compare(group, "with its gradient", both, target.call, inputs, **options)


def test_an_empty_kernel(benchmark, device, not_measured) -> None:
    """What a launch costs by itself: one after the other, in a graph of many, and as a graph of one."""
    if device.type != "cuda":
        not_measured(LARGE)

    def empty() -> None:
        # a kernel that waits for one cycle
        torch.cuda._sleep(1)

    clock = clock_of(device)
    many, one = clock.replay(empty, [()] * 64), clock.replay(empty, [()])
    calls = {"launched": (empty, 1), "in a graph of 64": (many, 64), "a graph of one": (one, 1)}
    times = {
        name: statistics.median(clock.block(call, [()], 200) for _ in range(BLOCKS)) / kernels * 1e6
        for name, (call, kernels) in calls.items()
    }
    benchmark.group = "an empty kernel"
    benchmark.pedantic(empty, rounds=3)
    benchmark.extra_info.update(table="launch", us=times, device=device.type)
