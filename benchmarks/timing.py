"""How long calls take: by the host's clock for a CPU, by a GPU's own events for that; and what they allocate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[..., Any]
Inputs = tuple[Any, ...]

# so many of each call, or fewer where the slowest would take more than so many times as long as it should
BLOCKS, FEWEST_BLOCKS, OVERTIME = 20, 3, 8
# a call that is slower than this is called once beforehand
SLOW = 0.1
# copies of the inputs of a GPU's call: past its L2 twice over, but no more calls than one graph should hold
MOST_COPIES = 64


class HostClock:
    """For the CPU, whose calls are done when they return. Their inputs stay where they are: in the caches, if small."""

    def copies(self, inputs: Inputs) -> list[Inputs]:
        return [inputs]

    def block(self, call: Call, copies: Sequence[Inputs], count: int) -> float:
        """Seconds that each of so many calls takes."""
        inputs = copies[0]
        start = time.perf_counter()
        for _ in range(count):
            call(*inputs)
        return (time.perf_counter() - start) / count


class DeviceClock:
    """For a GPU: the time between two events around calls that are not waited for, each on other copies of its inputs.

    What a GPU's L2 holds of one call's inputs would make the next call of the same faster than the sampler sees it.
    """

    def copies(self, inputs: Inputs) -> list[Inputs]:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        size = max(1, sum(each.nbytes for each in inputs if isinstance(each, Tensor)))
        count = min(MOST_COPIES, 2 + 2 * cache // size)
        return [tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs) for _ in range(count)]

    def block(self, call: Call, copies: Sequence[Inputs], count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for inputs in islice(cycle(copies), count):
            call(*inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def replay(self, call: Call, copies: Sequence[Inputs]) -> Callable[[], None]:
        """One graph of a call on each of the copies."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in islice(cycle(copies), 3):
                call(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in copies:
                call(*inputs)
        return graph.replay

    def enqueuing(self, call: Call, copies: Sequence[Inputs], count: int = 100) -> float:
        """Seconds of the host's that a call takes, while the GPU has yet to run what was asked of it before."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for inputs in islice(cycle(copies), count):
            call(*inputs)
        seconds = (time.perf_counter() - start) / count
        torch.cuda.synchronize()
        return seconds


Clock = HostClock | DeviceClock


def clock_of(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()


def interleaved(clock: Clock, calls: Sequence[Call], copies: Sequence[Sequence[Inputs]], seconds: float) -> list[float]:
    """Median seconds of one call of each, all timed in turn, so that their ratios hold on a noisy machine.

    They alternate in blocks of calls, not call by call: after one call of a long one the caches hold nothing of a
    short one's, and after a short call they still hold the long one's.
    """
    rough = [_rough(clock, call, inputs) for call, inputs in zip(calls, copies)]
    counts = [max(1, round(seconds / BLOCKS / each)) for each in rough]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(min(BLOCKS, max(FEWEST_BLOCKS, round(OVERTIME * seconds / max(rough))))):
        for kept, call, inputs, count in zip(times, calls, copies, counts):
            kept.append(clock.block(call, inputs, count))
    return [statistics.median(kept) for kept in times]


def _rough(clock: Clock, call: Call, copies: Sequence[Inputs]) -> float:
    """Seconds of one warm call."""
    first = clock.block(call, copies, 1)
    if first > SLOW:
        return first
    clock.block(call, copies, 2)
    return clock.block(call, copies, 3)


def shares_within(call: Callable[[], Any], parts: Mapping[str, tuple[Any, str]], seconds: float) -> dict[str, float]:
    """Of a call on the CPU, the median share of its time that each part takes: a function, as (owner, attribute)."""
    spent: dict[str, float] = {}

    def timed(part: str, function: Call) -> Call:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            spent[part] += time.perf_counter() - start
            return result

        return run

    found: dict[str, list[float]] = {part: [] for part in parts}
    with ExitStack() as patches:
        for part, (owner, attribute) in parts.items():
            patches.enter_context(patch.object(owner, attribute, timed(part, getattr(owner, attribute))))
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds or len(found[part]) < FEWEST_BLOCKS:
            spent.update(dict.fromkeys(parts, 0.0))
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            for part, kept in found.items():
                kept.append(spent[part] / whole)
    return {part: statistics.median(kept) for part, kept in found.items()}


def peak_memory(call: Call, inputs: Inputs, device: torch.device) -> int:
    """Bytes that PyTorch's allocator has given out at most during a call, beyond what was there before.

    What a compiled kernel or NumPy takes from the system by itself is not among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*inputs)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        # held while the profile lasts, as a caller would
        result = call(*inputs)
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Recorder:
    """Stands in for a compiled module, and keeps the last call of it: the kernel and its arguments."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.call: partial[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)

        def run(*arguments: Any) -> Any:
            self.call = partial(function, *arguments)
            return function(*arguments)

        return run


@contextmanager
def kernel_alone(call: Call, inputs: Inputs) -> Iterator[partial[Any] | None]:
    """The CPU's kernel that a call ends in, with the same pointers, and nothing around it; None if there is not one.

    While the block lasts, so does what the call returned: it must be all that the kernel writes to.
    """
    from calguide_fast.backends import cpu

    kernels, module, plain = cpu._kernels, cpu._cpu, cpu.plain
    recorder = Recorder(module)
    # without the functions that read tensors, as those of pointers then take the call
    kernels.native, cpu._cpu, cpu.plain = recorder, recorder, None
    try:
        result = call(*inputs)
    finally:
        kernels.native, cpu._cpu, cpu.plain = module, module, plain
    yield recorder.call
    del result
