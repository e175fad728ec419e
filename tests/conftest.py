"""What every test shares: poisoned memory, fixed seeds, the markers, and the backends to run over."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from emulation.backend import serve_cpu_tensors

from calguide_fast import backends, use_backend

# without a GPU, Triton's kernels run in its interpreter; it must be on before anything imports Triton
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    for item in items:
        if _is_slow_when_interpreted(item):
            item.add_marker(pytest.mark.full)
    if not config.getoption("full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)


def _is_slow_when_interpreted(item: pytest.Item) -> bool:
    """Whether a test of Triton's interpreter takes long for what it adds: whole samples, and the middles of ranges."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if parameters.get("backend") != "triton":
        return False
    return "sampler" in item.path.parts or 40.0 in parameters.values() or parameters.get("num_classes") == 1000


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=[*CPU_BACKENDS, "cuda", "triton", *(GPU_BACKENDS if torch.cuda.is_available() else [])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend on CPU tensors, CUDA by emulation and Triton by interpretation; and a GPU's if there is one.

    The GPU is then the default device. A backend that was not built is an error: the package builds it.
    """
    name = request.param.removeprefix("gpu:")
    on_gpu = name != request.param
    if name == "cuda" and not on_gpu:
        serve_cpu_tensors(monkeypatch)
    elif name == "triton" and not on_gpu:
        request.getfixturevalue("interpreted_triton")
    with torch.device("cuda") if on_gpu else nullcontext(), use_backend(name):
        yield name


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend in its interpreter, serving CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is present: Triton compiles for it, and serves no CPU tensors")
    if not HAS_TRITON:
        pytest.skip("triton is not installed (it is a part of the dev extra on Linux)")
    from triton.runtime import interpreter

    from calguide_fast.backends.triton import launch

    monkeypatch.setitem(backends._SPECS, "triton", backends._SPECS["triton"]._replace(devices=frozenset({"cpu"})))
    # programs run one after the other: fewer and larger ones are much quicker
    monkeypatch.setattr(launch, "LEAST_ROWS", 16)
    # named like their functions, which hide them
    tiles = {"PLACES": 1024, "NODE_LANES": 64, "SAMPLES": 4096, "SHARED_OUT": 4096}
    for name, own in (("smooth_ece", tiles), ("smooth_ece_gradient", ("PLACES", "SAMPLES"))):
        module = importlib.import_module(f"calguide_fast.backends.triton.{name}")
        for tile in own:
            monkeypatch.setattr(module, tile, tiles[tile])
    monkeypatch.setattr(interpreter, "_convert_float", _rounding(interpreter._convert_float))


def _rounding(convert: Callable) -> Callable:
    """The interpreter's conversion of floats, but to the nearest bfloat16 as on a GPU: its own cuts off."""

    def convert_float(values, source, target, *rest):
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, *rest)

    return convert_float
