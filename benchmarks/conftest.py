"""Interleaved timing: each row times one peer and ours in turn, so that their ratio holds on a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

Call = Callable[[], Any]

# of each side of each row
SECONDS, SMOKE_SECONDS = 0.4, 0.02
BLOCKS = 20
# a peer that is slower than this gets fewer blocks, and is called once beforehand
SLOW, FEWEST_BLOCKS = 0.5, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="few shapes and rounds, no torch.compile: that it runs at all"
    )
    parser.addoption("--threads", type=int, default=1, help="CPU threads of torch and of the kernels (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.addinivalue_line("markers", "smoke: part of the short run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke"):
        dropped = [item for item in items if item.get_closest_marker("smoke") is None]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.get_closest_marker("smoke") is not None]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compare(group, name, peer, ours, floor)`` times both in turn; the ratio is kept beside the peer's statistics.

    The ratio should be at least the floor, and at most the ceiling.

    They alternate in blocks of calls, not call by call: after one call of a long peer the caches hold nothing of ours,
    and after a short call of ours they still hold the peer's.
    """

    def run(
        group: str,
        name: str,
        peer: Call,
        ours: Call,
        floor: float | None = None,
        size: int = 0,
        ceiling: float | None = None,
    ) -> None:
        seconds = SMOKE_SECONDS if request.config.getoption("--smoke") else SECONDS
        peer_seconds, our_seconds = _seconds(peer), _seconds(ours)
        peer_calls, our_calls = (max(1, round(seconds / BLOCKS / each)) for each in (peer_seconds, our_seconds))
        blocks = BLOCKS if peer_seconds < SLOW else FEWEST_BLOCKS
        peer_times, our_times = [], []
        for _ in range(blocks):
            peer_times.append(_block(peer, peer_calls))
            our_times.append(_block(ours, our_calls))
        peer_time, our_time = statistics.median(peer_times), statistics.median(our_times)

        benchmark.group = group
        benchmark.pedantic(peer, iterations=peer_calls, rounds=blocks)
        benchmark.extra_info.update(
            peer=name,
            peer_us=peer_time * 1e6,
            ours_us=our_time * 1e6,
            ratio=peer_time / our_time,
            floor=floor,
            ceiling=ceiling,
            ns_per_element=our_time * 1e9 / size if size else None,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    return run


def _block(call: Call, count: int) -> float:
    """Seconds a call takes, over so many."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _seconds(call: Call) -> float:
    """A rough time of one warm call."""
    first = _block(call, 1)
    if first > SLOW:
        return first
    _block(call, 2)
    return _block(call, 3)


# after pytest-benchmark's own tables
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [(b.group, b.extra_info) for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section(f"ours against each peer, interleaved medians, {rows[0][1]['threads']} thread(s)")
    width = max(len(group) for group, _ in rows)
    for group, info in rows:
        wanted, missed = "", False
        if info["floor"] is not None:
            wanted, missed = f"floor {info['floor']:g}", info["ratio"] < info["floor"]
        elif info["ceiling"] is not None:
            wanted, missed = f"ceiling {info['ceiling']:g}", info["ratio"] > info["ceiling"]
        terminalreporter.write_line(
            f"{group:<{width}}  {info['peer']:<18} {info['peer_us']:>10.1f} µs  ours {info['ours_us']:>9.1f} µs  "
            f"ratio {info['ratio']:>6.1f}  {wanted}{'  MISSED' * missed}".rstrip()
        )
