"""The options, the ``compare`` fixture that makes a row, and the table that a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from aims import floor_of
from ceiling import bandwidth
from timing import DeviceClock, clock_of, interleaved, kernel_alone, peak_memory

from calguide_fast import backend_report, use_backend

# of each side of each row
SECONDS, SMOKE_SECONDS = 0.25, 0.02
# rounds of the peer that pytest-benchmark's own table shows
ROUNDS = 3
# a GPU's calls that move less than this are timed as replays of a graph, too
SMALL = 1 << 26


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="few shapes and rounds, no torch.compile: that it runs at all"
    )
    parser.addoption("--threads", type=int, default=1, help="CPU threads of torch and of the kernels (default 1)")
    parser.addoption("--device", help="cpu or cuda (default: cuda where there is one)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.addinivalue_line("markers", "smoke: part of the short run")
    config.stash[_NOT_MEASURED] = {}


# why rows are missing, each reason once: the keys of a dictionary keep their order
_NOT_MEASURED = pytest.StashKey[dict[str, None]]()


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _backends(device: torch.device) -> list[str]:
    """Those with kernels for the device, the default first."""
    serving = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device.type]
    return [status.name for status in backend_report() if status.loaded and status.name in serving]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _backends(_device(metafunc.config)), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke"):
        dropped = [item for item in items if item.get_closest_marker("smoke") is None]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.get_closest_marker("smoke") is not None]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return _device(request.config)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Each backend with kernels for the device in turn."""
    # the default is what a user gets, with nothing in between
    chosen = nullcontext() if request.param == _backends(device)[0] else use_backend(request.param)
    with chosen:
        yield request.param


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long to time each side of a row."""
    return SMOKE_SECONDS if request.config.getoption("--smoke") else SECONDS


@pytest.fixture
def not_measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``not_measured(reason)`` skips, and has the run's end say why."""

    def say(reason: str) -> None:
        request.config.stash[_NOT_MEASURED][reason] = None
        pytest.skip(reason)

    return say


@pytest.fixture
def compare(
    benchmark: Any, seconds: float, device: torch.device, request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Makes a row of a peer and ours; see ``run``, which this gives."""

    def run(
        group: str,
        name: str,
        peer: Callable[..., Any],
        ours: Callable[..., Any],
        inputs: tuple[Any, ...],
        *,
        expected: Any = None,
        same_result: bool = True,
        rtol: float = 1e-4,
        atol: float = 2e-5,
        peer_rtol: float | None = None,
        floor: float | None = None,
        ceiling: float | None = None,
        size: int = 0,
        traffic: int = 0,
        host: bool = False,
        whole: Callable[..., Any] | None = None,
        in_torch: bool = True,
        waits: bool = False,
        **more: Any,
    ) -> None:
        """Checks both sides, times them in turn, and keeps what was measured beside the peer's statistics.

        Args:
            group: the op and its shape: rows of one group share ours.
            name: of the peer.
            peer: what it is compared with, of the same inputs.
            ours: the op.
            inputs: of both; those of a GPU are rotated through copies.
            expected: a tensor or a tuple of them, float64, that ours must equal; None if the test has checked it.
            same_result: whether the peer must, too. One that does another job is there for scale.
            rtol: for fp32 against float64; wider for narrower dtypes.
            atol: the same.
            peer_rtol: for a peer that promises less.
            floor: the ratio should be at least this; on a CPU, what `aims` says if not given.
            ceiling: the ratio should be at most this.
            size: elements of the input, for the time of each.
            traffic: bytes that ours must read and write.
            host: measure what is spent around the kernel.
            whole: for that, ours with all that its kernel writes to, if ours gives less.
            in_torch: whether the peer allocates through PyTorch.
            waits: whether either waits for a GPU, so that no graph of it can be recorded.
            more: kept with the row.
        """
        clock = clock_of(device)
        copies = clock.copies(inputs)
        if floor is None and device.type == "cpu":
            floor = floor_of(group, name)
        if expected is not None:
            _check("ours", ours(*copies[0]), expected, rtol, atol)
            if same_result:
                _check(name, peer(*copies[0]), expected, rtol if peer_rtol is None else peer_rtol, atol)
        peer_time, our_time = interleaved(clock, [peer, ours], [copies, copies], seconds)

        benchmark.group = group
        shown = peer if device.type == "cpu" else _waited_for(peer)
        benchmark.pedantic(shown, args=inputs, iterations=max(1, round(0.01 / peer_time)), rounds=ROUNDS)
        copying = bandwidth(traffic, device)
        benchmark.extra_info.update(
            peer=name,
            peer_us=peer_time * 1e6,
            ours_us=our_time * 1e6,
            ratio=peer_time / our_time,
            same_result=same_result,
            floor=floor,
            ceiling=ceiling,
            size=size or None,
            ns_per_element=our_time * 1e9 / size if size else None,
            bytes=traffic or None,
            gb_per_s=traffic / our_time / 1e9 if traffic else None,
            copy_gb_per_s=copying / 1e9 if copying else None,
            share_of_copy=traffic / our_time / copying if copying else None,
            peak_bytes=peak_memory(ours, copies[0], device),
            peer_peak_bytes=peak_memory(peer, copies[0], device) if in_torch else None,
            host_us=_host_time(clock, whole or ours, copies, seconds) if host else None,
            device=device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            **more,
        )
        if isinstance(clock, DeviceClock) and in_torch and not waits and traffic < SMALL:
            benchmark.extra_info.update(_replayed(clock, peer, ours, copies, seconds))

    return run


def _check(name: str, found: Any, expected: Any, rtol: float, atol: float) -> None:
    def pairs(found: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # of several results as many as are expected
        yield from [(found, expected)] if isinstance(expected, torch.Tensor) else zip(tuple(found), expected)

    for one, other in pairs(found, expected):
        torch.testing.assert_close(
            one.double(), other, rtol=rtol, atol=atol, msg=lambda text: f"{name} is wrong: {text}"
        )


def _waited_for(call: Callable[..., Any]) -> Callable[..., None]:
    """For pytest-benchmark's table, which looks at the host's clock."""

    def run(*inputs: Any) -> None:
        call(*inputs)
        torch.cuda.synchronize()

    return run


def _host_time(clock: Any, ours: Callable[..., Any], copies: Any, seconds: float) -> float:
    """Microseconds of the host's: on a CPU those beyond the kernel's own, on a GPU those to ask for the call."""
    if isinstance(clock, DeviceClock):
        return clock.enqueuing(ours, copies) * 1e6
    with kernel_alone(ours, copies[0]) as kernel:
        assert kernel is not None, "ours calls no kernel"
        whole, alone = interleaved(clock, [ours, kernel], [copies, [()]], seconds)
    return (whole - alone) * 1e6


def _replayed(clock: DeviceClock, peer: Any, ours: Any, copies: Any, seconds: float) -> dict[str, float]:
    graphs = [clock.replay(call, copies) for call in (peer, ours)]
    peer_time, our_time = (each / len(copies) for each in interleaved(clock, graphs, [[()], [()]], seconds))
    return {"graph_peer_us": peer_time * 1e6, "graph_ours_us": our_time * 1e6, "graph_ratio": peer_time / our_time}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the figures depend on, and no name of the machine's."""
    machine_info.pop("node", None)
    device = _device(config)
    machine_info.update(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        backends={status.name: status.detail for status in backend_report() if status.loaded},
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep statistics, not every round's time, and what this machine could not measure."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
    output_json["not_measured"] = list(config.stash[_NOT_MEASURED])


# after pytest-benchmark's own tables
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [(b.group, b.extra_info) for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if rows:
        threads = rows[0][1]["threads"]
        terminalreporter.section(f"ours against each peer, interleaved medians, {threads} thread(s)")
        width = max(len(group) for group, _ in rows)
        names = max(len(info["peer"]) for _, info in rows)
        for group, info in rows:
            terminalreporter.write_line(_line(group, info, width, names))
    pairs = [(b.group, b.extra_info) for b in session.benchmarks if "copy_us" in b.extra_info] if session else []
    for group, info in pairs:
        ours, copy = (one / two for one, two in (info["us"], info["copy_us"]))
        terminalreporter.write_line(f"{group}: {ours:.2f} times as fast with two threads, a copy {copy:.2f}")
    grown = [(b.group, b.extra_info) for b in session.benchmarks if "exponent" in b.extra_info] if session else []
    for group, info in grown:
        steep = info["exponent"] is not None and info["exponent"] > info["ceiling"]
        found = "fixed cost" if info["exponent"] is None else f"as work to the power of {info['exponent']:.2f}"
        terminalreporter.write_line(f"{group}: {found}, ceiling {info['ceiling']:g}{'  MISSED' * steep}")
    for reason in config.stash[_NOT_MEASURED]:
        terminalreporter.write_line(f"not measured here: {reason}")


def _line(group: str, info: dict[str, Any], width: int, names: int) -> str:
    wanted, missed = "", False
    if info["floor"] is not None:
        wanted, missed = f"floor {info['floor']:g}", info["ratio"] < info["floor"]
    elif info["ceiling"] is not None:
        wanted, missed = f"ceiling {info['ceiling']:g}", info["ratio"] > info["ceiling"]
    share = f"{info['share_of_copy']:>4.0%} of a copy" if info["share_of_copy"] else ""
    return (
        f"{group:<{width}}  {info['peer']:<{names}} {info['peer_us']:>11.1f} µs  ours {info['ours_us']:>10.1f} µs  "
        f"ratio {info['ratio']:>6.1f}  {share:<14}  {wanted}{'  MISSED' * missed}"
    ).rstrip()
