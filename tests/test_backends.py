"""Choice of backend: by device and dtype, by name, by environment; the report; and what cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from calguide_fast import backend_report, backends, guidance_gradient, tilt_weights, use_backend
from calguide_fast.backends import reference
from calguide_fast.cli import main

LOGITS, LABELS = torch.randn(3, 5), torch.tensor([0, 1, 2])


def chosen(dtype: torch.dtype = torch.float32) -> str:
    return backends.choose(torch.empty(0, dtype=dtype)).__name__.rpartition(".")[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_default_is_the_kernel_where_it_serves():
    assert [chosen(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)] == ["cpu"] * 4
    assert chosen(torch.float64) == "reference"


def test_context_manager_restores():
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("cpu"):
            assert chosen() == "cpu"
        with use_backend(None):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_call_stays():
    try:
        use_backend("reference")
        assert chosen() == "reference"
        assert "every op uses 'reference'" in str(backend_report())
    finally:
        use_backend(None)
    assert chosen() == "cpu"


def test_ops_use_the_chosen_backend(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "guidance_gradient", refuse)
    monkeypatch.setattr(reference, "tilt_weights", refuse)
    guidance_gradient(LOGITS, LABELS)
    tilt_weights(LOGITS[0], 1.0)
    with use_backend("reference"):
        for call in (lambda: guidance_gradient(LOGITS, LABELS), lambda: tilt_weights(LOGITS[0], 1.0)):
            with pytest.raises(AssertionError, match="the reference was asked"):
                call()


def test_unknown_name():
    with pytest.raises(
        ValueError, match="name='gpu' is not a backend; choose one of 'cpu', 'cuda', 'triton', 'reference'"
    ):
        use_backend("gpu")
    assert chosen() == "cpu"


def test_a_backend_that_does_not_serve_says_so():
    with use_backend("cpu"), pytest.raises(ValueError, match="'cpu'.*does not serve torch.float64 tensors on 'cpu'"):
        guidance_gradient(LOGITS.double(), LABELS)


def test_environment_chooses():
    code = "import calguide_fast; print(calguide_fast.backend_report())"
    told = python(code, CALGUIDE_BACKEND="reference")
    assert told.returncode == 0 and "every op uses 'reference'" in told.stdout
    free = python(code, CALGUIDE_BACKEND="")
    assert free.returncode == 0 and "every op uses" not in free.stdout
    wrong = python(code, CALGUIDE_BACKEND="fast")
    assert wrong.returncode != 0 and "CALGUIDE_BACKEND='fast' is not a backend" in wrong.stderr


def test_report_says_what_is_there():
    report = backend_report()
    by_name = {status.name: status for status in report}
    assert by_name["cpu"].loaded and by_name["cpu"].default_on == ("cpu",) and not by_name["cpu"].missing
    assert by_name["reference"].loaded and "cpu" not in by_name["reference"].default_on
    text = str(report)
    for word in (torch.__version__, "cpu", "reference", "loaded", "default on cpu"):
        assert word in text


@pytest.fixture
def broken_cpu(monkeypatch):
    """The state in which the native module was not built."""
    real = backends.importlib.import_module

    def import_module(name, *rest):
        if name.endswith(".cpu"):
            raise ImportError("libgomp.so.1: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    for state in ("_loaded", "_failures", "_defaults"):
        monkeypatch.setattr(backends, state, {})


def test_a_backend_that_fails_to_load_is_told_and_replaced(broken_cpu, capsys):
    with pytest.warns(RuntimeWarning, match="'cpu' backend is not available.*libgomp.*'reference'") as warned:
        found = guidance_gradient(LOGITS, LABELS)
        guidance_gradient(LOGITS, LABELS)
    assert len([w for w in warned if w.category is RuntimeWarning]) == 1, "once is enough"
    with use_backend("reference"):
        assert torch.equal(found.grad, guidance_gradient(LOGITS, LABELS).grad)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be loaded: libgomp.so.1"):
        use_backend("cpu")
    assert chosen() == "reference"
    by_name = {status.name: status for status in backend_report()}
    assert not by_name["cpu"].loaded and "libgomp" in by_name["cpu"].detail
    assert by_name["cpu"].missing and "cpu" in by_name["reference"].default_on, "what is chosen in its place"
    assert main(["doctor"]) == 1
    assert "libgomp.so.1" in capsys.readouterr().out


@pytest.fixture
def loadable(monkeypatch):
    """Call with the names that can be loaded on a machine with a GPU; the modules are stand-ins."""

    def set_loadable(*names: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        modules = {name: ModuleType(f"calguide_fast.backends.{name}") for name in names}
        failures = {name: f"no {name} here" for name in backends._SPECS if name not in names}
        monkeypatch.setattr(backends, "_loaded", modules)
        monkeypatch.setattr(backends, "_failures", failures)
        monkeypatch.setattr(backends, "_defaults", {})

    return set_loadable


@pytest.mark.parametrize(
    ("names", "choice"),
    [
        (("cpu", "cuda", "triton", "reference"), "cuda"),
        (("cpu", "triton", "reference"), "triton"),
        (("cpu", "cuda", "reference"), "cuda"),
    ],
)
def test_kernels_for_a_gpu_are_taken_in_order(names, choice, loadable, recwarn):
    loadable(*names)
    assert backends._default(torch.float32, "cuda").__name__.endswith(choice)
    assert backends._default(torch.int64, "cuda").__name__.endswith(choice)
    assert backends._default(torch.float64, "cuda").__name__.endswith("reference")
    assert not recwarn.list, "there is nothing to warn of where kernels are chosen"
    by_name = {status.name: status for status in backend_report()}
    assert by_name[choice].default_on == ("cuda",) and by_name["cpu"].default_on == ("cpu",)
    # one that is not there is no loss where another serves
    assert not any(status.missing for status in by_name.values())
    for name in set(backends._SPECS) - set(names):
        assert not by_name[name].loaded and by_name[name].detail == f"no {name} here"


def test_float64_is_served_op_by_op():
    wide = torch.empty(0, dtype=torch.float64)
    assert backends.choose(wide, "smooth_ece").__name__.endswith("cpu")
    assert backends.choose(wide, "guidance_gradient").__name__.endswith("reference")
    with use_backend("cpu"):
        assert backends.choose(wide, "smooth_ece").__name__.endswith("cpu")
        with pytest.raises(ValueError, match="does not serve torch.float64"):
            backends.choose(wide, "guidance_gradient")


def test_a_gpu_without_kernels_is_told_with_every_reason(loadable):
    loadable("cpu", "reference")
    with pytest.warns(
        RuntimeWarning, match="'cuda'.*no cuda here.*'triton'.*no triton here.*slow 'reference'"
    ) as warned:
        assert backends._default(torch.float32, "cuda").__name__.endswith("reference")
    assert len(warned) == 1
    assert [status.name for status in backend_report() if status.missing] == ["cuda", "triton"]
    assert main(["doctor"]) == 1


def test_a_reason_is_one_line(monkeypatch):
    monkeypatch.setattr(backends, "_failures", {})

    def import_module(name):
        raise ImportError("first\n  second")

    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    assert backends._load("a backend") is None and backends._failures == {"a backend": "first second"}


def test_doctor(capsys):
    """A backend for a device that this machine has not got is not a fault."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is present: what is said of it is tested with stand-ins")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == str(backend_report())


def test_doctor_from_the_shell():
    run = subprocess.run([sys.executable, "-m", "calguide_fast", "doctor"], capture_output=True, text=True)
    assert run.returncode == 0 and "default on cpu" in run.stdout
    missing = subprocess.run([sys.executable, "-m", "calguide_fast"], capture_output=True, text=True)
    assert missing.returncode == 2 and "COMMAND" in missing.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("calguide-fast 0.")


def test_import_is_quiet_and_loads_no_heavy_extras():
    code = "import sys, calguide_fast; print([m for m in ('triton', 'sklearn', 'matplotlib') if m in sys.modules])"
    run = python(code)
    assert run.returncode == 0 and run.stdout.strip() == "[]" and run.stderr == ""


def test_cuda_kernels_that_were_not_built_say_so():
    code = (
        "import importlib.util as util, torch; find = util.find_spec; torch.version.cuda = '13.0'\n"
        "util.find_spec = lambda name, *rest: None if name.endswith('._cuda') else find(name, *rest)\n"
        "import calguide_fast; print(calguide_fast.backend_report())"
    )
    run = python(code)
    assert run.returncode == 0 and "the CUDA kernels are not built: there was no nvcc" in run.stdout
