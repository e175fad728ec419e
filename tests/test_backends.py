"""Choice of backend: by device and dtype, by name, by environment; the report; and what cannot be loaded."""

from __future__ import annotations

import subprocess
import sys

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
    with pytest.raises(ValueError, match="name='gpu' is not a backend; choose one of 'cpu'.*'reference'"):
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


@pytest.mark.parametrize("has_gpu", [False, True])
def test_doctor(capsys, monkeypatch, has_gpu):
    """A device for which there is no kernel to load is not a fault."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
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
