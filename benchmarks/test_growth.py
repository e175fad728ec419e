"""Our ops at growing sizes: nothing should grow faster than its work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from ceiling import bandwidth
from test_smooth_ece import sample as calibration_sample
from timing import clock_of, interleaved

from calguide_fast import guidance_gradient, guided_step, smooth_ece, tilt_weights
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.top_label import top_label
from calguide_fast.schedule import Schedule

# the time may grow by this power of what the work has grown by, or a copy's time, as larger sizes leave the caches;
# looked at once it is so many times that of the smallest size, and over so many times the work
MOST, FIXED_COST, RANGE = 1.2, 3.0, 10


class Axis(NamedTuple):
    """What grows: the sizes, the call at a size, the work as a power of it, and the bytes that a unit of work moves."""

    sizes: tuple[int, ...]
    call: Callable[[int, torch.device], Callable[[], Any]]
    power: int
    traffic: int


def guidance(batch: int, classes: int, divergence: str, device: torch.device) -> Callable[[], Any]:
    logits = 3 * torch.randn(batch, classes, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    out = torch.empty_like(logits)
    return lambda: guidance_gradient(logits, labels, divergence, out=out)


def step(count: int, pixels: int, device: torch.device) -> Callable[[], Any]:
    x_t, gradient, noise = (torch.randn(count, 3, pixels, pixels, device=device) for _ in range(3))
    output = torch.randn(count, 6, pixels, pixels, device=device)
    row, out = Schedule.linear().respaced("250").coefficients()[100].to(device), torch.empty_like(x_t)
    return lambda: guided_step(x_t, output, row, gradient, noise=noise, out=out)


def noise(pixels: int, device: torch.device) -> Callable[[], Any]:
    seeds = torch.arange(16, device=device)
    return lambda: sampling_noise(seeds, (3, pixels, pixels), 1)


def calibration(count: int, device: torch.device, gradient: bool) -> Callable[[], Any]:
    confidence, correct = (tensor.to(device) for tensor in calibration_sample(count))
    if not gradient:
        return lambda: smooth_ece(confidence, correct)
    confidence.requires_grad_()
    return lambda: torch.autograd.grad(smooth_ece(confidence, correct).value, confidence)


def labelled(count: int, device: torch.device) -> Callable[[], Any]:
    logits, labels = 3 * torch.randn(count, 1000, device=device), torch.randint(1000, (count,), device=device)
    return lambda: top_label(logits, labels)


def tilted(count: int, device: torch.device) -> Callable[[], Any]:
    scores = torch.randn(count, device=device)
    return lambda: tilt_weights(scores, -0.2)


BATCHES = tuple(4**k for k in range(7))
CLASSES = (10, 100, 1000, 10_000, 100_000)
PIXELS = (8, 16, 32, 64, 128, 256, 512)
SAMPLES = (100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)
AXES = {
    "guidance reverse_kl, B x 1000": Axis(BATCHES, lambda n, d: guidance(n, 1000, "reverse_kl", d), 1, 8000),
    "guidance js, B x 1000": Axis(BATCHES, lambda n, d: guidance(n, 1000, "js", d), 1, 8000),
    "guidance reverse_kl, 16 x C": Axis(CLASSES, lambda n, d: guidance(16, n, "reverse_kl", d), 1, 128),
    "guidance js, 16 x C": Axis(CLASSES, lambda n, d: guidance(16, n, "js", d), 1, 128),
    "guided_step, 4 x 3 x side²": Axis(PIXELS, lambda n, d: step(4, n, d), 2, 12 * 24),
    "guided_step, B x 3 x 32²": Axis(BATCHES, lambda n, d: step(n, 32, d), 1, 3 * 32**2 * 24),
    "sampling_noise, 16 x 3 x side²": Axis(PIXELS, noise, 2, 48 * 4),
    "tilt_weights, B": Axis(BATCHES, tilted, 1, 8),
    "top_label, n x 1000": Axis(BATCHES, labelled, 1, 4021),
    "smooth_ece, n": Axis(SAMPLES, lambda n, d: calibration(n, d, False), 1, 5),
    "smooth_ece with gradient, n": Axis(SAMPLES, lambda n, d: calibration(n, d, True), 1, 9),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] * name.startswith("tilt")) for name in AXES]
)
def test_growth(benchmark, device, backend, seconds, name: str) -> None:
    axis = AXES[name]
    torch.manual_seed(0)
    clock = clock_of(device)
    calls = [axis.call(size, device) for size in axis.sizes]
    # all in turn: a machine that is busy for a second should not look like growth
    times = interleaved(clock, calls, [clock.copies(())] * len(calls), seconds / 2)
    work = [size**axis.power for size in axis.sizes]
    copies = []
    for moved in (done * axis.traffic for done in work):
        copying = bandwidth(moved, device)
        copies.append(moved / copying if copying else 0.0)
    benchmark.group = f"growth {name}"
    benchmark.pedantic(calls[-1], rounds=1)
    benchmark.extra_info.update(
        table="growth",
        sizes=axis.sizes,
        work=work,
        us=[time * 1e6 for time in times],
        exponent=exponent(work, copies, times),
        ceiling=MOST,
    )


def exponent(work: list[int], copies: list[float], times: list[float]) -> float | None:
    """The steepest growth from a size whose time is more than fixed cost to the largest; None if that is about all."""
    steepest = None
    for done, copied, time in zip(work[:-1], copies, times):
        if time > FIXED_COST * times[0] and RANGE * done <= work[-1]:
            due = max(work[-1] / done, copies[-1] / copied if copied else 0.0)
            steepest = max(steepest or 0.0, math.log(times[-1] / time) / math.log(due))
    return steepest
