"""What every test shares: poisoned memory, fixed seeds, the markers, and the backends to run over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulation.backend import serve_cpu_tensors

from calguide_fast import backends, use_backend

# torch.empty gives NaN, so that a kernel that leaves a value unwritten is seen
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# one thread: with more, small tensors on a busy machine wait for each other; tests of threads ask for two
torch.set_num_threads(1)

CPU_BACKENDS = [name for name, spec in backends._SPECS.items() if spec.devices is None or "cpu" in spec.devices]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full, too: whole grids of cases")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("full"):
        return "calguide_fast: with --full, whole grids of cases are run"
    return "calguide_fast: tests marked full (whole grids of cases) are left out; --full runs them"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device is present"))
    if not config.getoption("full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=[*CPU_BACKENDS, "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend that serves CPU tensors, and CUDA's by emulation. One that was not built is an error."""
    if request.param == "cuda":
        serve_cpu_tensors(monkeypatch)
    with use_backend(request.param):
        yield request.param
