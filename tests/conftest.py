"""What every test shares: poisoned memory, fixed seeds, the markers, and the backends to run over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from calguide_fast import backends, use_backend

# torch.empty gives NaN, so that a kernel that leaves a value unwritten is seen
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# one thread: with more, small tensors on a busy machine wait for each other; tests of threads ask for two
torch.set_num_threads(1)
# nor does a GPU round convolutions to 10 bits where float32 is tested
torch.backends.cudnn.allow_tf32 = False

CPU_BACKENDS = [name for name, spec in backends._SPECS.items() if spec.devices is None or "cpu" in spec.devices]
# where there is a GPU, the tests of all backends run on its tensors, too
GPU_BACKENDS = [pytest.param(f"gpu:{name}", marks=pytest.mark.gpu) for name in ("cuda", "triton")]


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


@pytest.fixture(params=[*CPU_BACKENDS, *(GPU_BACKENDS if torch.cuda.is_available() else [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that serves CPU tensors, and those of a GPU if there is one, which is the default device then.

    One that was not built is an error: the package builds it.
    """
    name = request.param.removeprefix("gpu:")
    device = nullcontext() if name == request.param else torch.device("cuda")
    with device, use_backend(name):
        yield name
