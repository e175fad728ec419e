"""Our CPU kernels with one thread and with two, beside a copy of as many bytes: what a second processor is worth."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_smooth_ece import sample as calibration_sample
from timing import HostClock, Inputs, interleaved, kernel_alone
from torch import Tensor

from calguide_fast import guidance_gradient, guided_step, smooth_ece
from calguide_fast.ops.top_label import top_label
from calguide_fast.schedule import Schedule

THREADS = (1, 2)


class Work(NamedTuple):
    """A call of an op, the tensors it gives, and the bytes that it must read and write."""

    call: Callable[[], Any]
    results: Callable[[Any], tuple[Tensor, ...]]
    traffic: int


def guidance(batch: int, classes: int, divergence: str, dtype: torch.dtype) -> Work:
    logits = (3 * torch.randn(batch, classes)).to(dtype)
    labels, out = torch.randint(classes, (batch,)), torch.empty_like(logits)
    return Work(lambda: guidance_gradient(logits, labels, divergence, out=out), tuple, 2 * logits.nbytes)


def step(drawn: bool) -> Work:
    x_t, gradient, noise = (torch.randn(16, 3, 128, 128) for _ in range(3))
    output, out = torch.randn(16, 6, 128, 128), torch.empty_like(x_t)
    row = Schedule.linear().respaced("250").coefficients()[100]
    source = {"seeds": torch.arange(16)} if drawn else {"noise": noise}
    traffic = x_t.nbytes * (5 if drawn else 6)
    return Work(lambda: guided_step(x_t, output, row, gradient, **source, out=out), lambda x: (x,), traffic)


def calibration(count: int) -> Work:
    confidence, correct = calibration_sample(count)
    return Work(lambda: smooth_ece(confidence, correct), lambda found: (found.value,), 5 * count)


def labelled(count: int, classes: int) -> Work:
    logits, labels = 3 * torch.randn(count, classes), torch.randint(classes, (count,))
    return Work(lambda: top_label(logits, labels), tuple, logits.nbytes + 21 * count)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((256, 1000), (4096, 1000), (64, 21843))
WORKS: dict[str, Callable[[], Work]] = {
    f"guidance {divergence} {batch}x{classes} {name}": lambda a=(batch, classes, divergence, dtype): guidance(*a)
    for batch, classes in SHAPES
    for divergence in ("reverse_kl", "js")
    for name, dtype in DTYPES.items()
} | {
    "guided_step 16x3x128x128, noise given": lambda: step(drawn=False),
    "guided_step 16x3x128x128, noise drawn": lambda: step(drawn=True),
    "smooth_ece 1000000": lambda: calibration(1_000_000),
    "smooth_ece 10000000": lambda: calibration(10_000_000),
    "top_label 50000x1000": lambda: labelled(50_000, 1000),
}


class Threaded(NamedTuple):
    """A call with so many threads."""

    threads: int
    run: Callable[[], Any]

    def __call__(self) -> Any:
        torch.set_num_threads(self.threads)
        return self.run()


class ThreadsClock(HostClock):
    """Changes the threads before each block, and not inside it."""

    def block(self, call: Threaded, copies: Any, count: int) -> float:
        # wakes the second one, or lets it sleep
        call()
        return super().block(call.run, copies, count)


def processors() -> int:
    """Those that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] * (name == "guidance js 256x1000 fp32")) for name in WORKS]
)
def test_threads(benchmark, device, backend, seconds, not_measured, threads_as_before, name: str) -> None:
    if device.type != "cpu":
        not_measured("threads are the CPU kernels'")
    if processors() < max(THREADS):
        not_measured(f"{max(THREADS)} threads need as many processors, and this machine lends one")
    torch.manual_seed(0)
    work = WORKS[name]()
    source = torch.ones(work.traffic // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    ours = [Threaded(threads, work.call) for threads in THREADS]
    copies = [Threaded(threads, lambda: target.copy_(source)) for threads in THREADS]
    found = [[each.clone() for each in work.results(call())] for call in ours]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    for call in ours:
        with kernel_alone(call, ()) as kernel:
            assert kernel is not None and kernel.args[0] == call.threads, "the kernel is given torch's threads"

    inputs: list[Inputs] = [()]
    times = interleaved(ThreadsClock(), [*ours, *copies], [inputs] * 4, seconds)
    benchmark.group = f"threads {name}"
    benchmark.pedantic(ours[-1], rounds=1)
    micros = [time * 1e6 for time in times]
    benchmark.extra_info.update(table="threads", bytes=work.traffic, us=micros[:2], copy_us=micros[2:])
