"""What the build promises of the CUDA module: made where nvcc is, loaded where no GPU is, and no row spilled."""

from __future__ import annotations

import importlib.util
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import setup_script
import torch
from setuptools.dist import Distribution

# one on every generation's budget: a block of 256 threads must fit the 65,536 registers of a multiprocessor
MOST_REGISTERS = {
    "guide_warp_rows": 255,
    "guide_block_rows": 176,
    "step_kernel": 96,
    "tilt_kernel": 96,
    "pull_rows": 72,
    # one block of 512 threads, alone on its multiprocessor
    "search_kernel": 128,
}


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    return setup_script.load()


def run(*command: str, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def module(build) -> Path:
    if build.nvcc() is None:
        pytest.skip("nvcc is not installed, so there is no CUDA module to look at")
    spec = importlib.util.find_spec("calguide_fast._cuda")
    assert spec is not None, "nvcc is here, and the CUDA module was not built"
    return Path(spec.origin)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The CUDA toolkit's, else the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    found = shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(inside)) if inside else None)
    if found is None:
        pytest.skip("cuobjdump, which reads machine code, comes with the CUDA toolkit or with Triton; neither is here")
    return found


def test_links_neither_driver_nor_runtime_nor_torch(module):
    libraries = run("ldd", str(module))
    assert "libc.so" in libraries
    for name in ("libcuda", "libcudart", "libtorch", "libc10", "not found"):
        assert name not in libraries, libraries


def test_loads_without_a_gpu_and_says_what_is_missing(module):
    code = "from calguide_fast import _cuda; print(_cuda.unavailable()); print(_cuda.runtime_version())"
    reason, version = run(sys.executable, "-c", code).splitlines()
    assert int(version) >= 11000
    assert bool(reason) != torch.cuda.is_available()
    report = run(sys.executable, "-m", "calguide_fast", "doctor")
    if torch.version.cuda is None:
        reason = f"this PyTorch is built {'for ROCm' if torch.version.hip else 'without CUDA'}"
    assert re.search(rf"cuda +not available +.*{reason}" if reason else "cuda +loaded +default on cuda", report), report


def test_hides_devices_politely(module):
    """As on a machine whose driver serves no device."""
    code = "from calguide_fast import _cuda; print(_cuda.unavailable())"
    assert run(sys.executable, "-c", code, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}).strip() in (
        "no NVIDIA driver",
        "no CUDA device",
    )


def test_machine_code_and_ptx_are_there(module, cuobjdump):
    assert {"75", "80", "90", "100", "120"} <= set(re.findall(r"sm_(\d+)", run(cuobjdump, "--list-elf", str(module))))
    assert "sm_120" in run(cuobjdump, "--list-ptx", str(module))


def test_no_kernel_spills_its_row(module, cuobjdump):
    report = run(cuobjdump, "--dump-resource-usage", str(module))
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    # three storage types of each way to keep a row and to label it, the smooth ECE's, three kinds of step, the rest
    assert len(kernels) >= 5 * (3 * (11 + 6) + 11 + 6)
    for name, registers, stack, shared, local in kernels:
        most = next((most for kind, most in MOST_REGISTERS.items() if kind in name), 64)
        assert int(registers) <= most, f"{name} takes {registers} registers"
        # the assembler may park a handful of a row's scalars to let one more warp in; no element of a row goes there
        assert int(stack) <= 32 and local == "0", f"{name} spills: stack {stack}, local {local}"
        # beside what a row takes at launch
        assert int(shared) <= 2048, f"{name} takes {shared} bytes of shared memory"


KNOWN = ["75", "80", "86", "90", "90a", "100"]


def test_architectures_can_be_chosen(build, monkeypatch):
    monkeypatch.setenv("CALGUIDE_CUDA_ARCHS", "8.0 90+PTX")
    assert build.cuda_archs(KNOWN) == (["80", "90"], ["90"])
    monkeypatch.setenv("CALGUIDE_CUDA_ARCHS", "86;90a")
    assert build.cuda_archs(KNOWN) == (["86", "90a"], [])
    monkeypatch.setenv("CALGUIDE_CUDA_ARCHS", "90;13")
    with pytest.raises(SystemExit, match="CALGUIDE_CUDA_ARCHS asks for 13; this nvcc knows .*90"):
        build.cuda_archs(KNOWN)


def test_default_architectures_are_those_that_nvcc_knows(build, monkeypatch):
    monkeypatch.delenv("CALGUIDE_CUDA_ARCHS", raising=False)
    assert build.cuda_archs(KNOWN) == (["75", "80", "90", "100"], ["100"])
    assert build.cuda_archs(["130"]) == (["130"], ["130"])


def fake_nvcc(folder: Path, body: str, listing: str = "sm_80 sm_90", release: str = "release 12.4") -> None:
    """An nvcc that answers questions and does `body` for work."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "nvcc"
    answers = f"case $1 in --list-gpu-code) echo {listing}; exit;; --version) echo {release}; exit;; esac"
    script.write_text(f"#!/bin/sh\n{answers}\n{body}\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_what_is_compiled_for_is_told_to_compiler_and_module(build, monkeypatch, tmp_path):
    fake_nvcc(tmp_path, "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CALGUIDE_CUDA_ARCHS", "90+PTX;80")
    commands = {name: command for _, name, command in build.cuda_module().objects}
    assert [flag for flag in commands["step.o"] if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert {"-DCALGUIDE_CUDA_MACHINE_CODE=_90_80", "-DCALGUIDE_CUDA_PTX=_90"} <= set(commands["bindings.o"])
    # what it makes, drivers of that release cannot load
    assert "--compress-mode=size" not in commands["step.o"]


def test_an_nvcc_that_does_not_answer_is_none(build, monkeypatch, tmp_path, capsys):
    fake_nvcc(tmp_path, "exit 1", listing="", release="")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.cuda_module() is None
    assert "does not say what it compiles for; building without CUDA kernels" in capsys.readouterr().out


def test_without_nvcc_one_line_says_so(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.cuda_module() is None
    assert re.fullmatch("calguide_fast: nvcc is neither .*; building without CUDA kernels\n", capsys.readouterr().out)
    monkeypatch.setenv("CALGUIDE_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="CALGUIDE_FORCE_CUDA is set, and nvcc is neither"):
        build.cuda_module()


def test_cuda_can_be_left_out(build, monkeypatch, capsys):
    monkeypatch.setenv("CALGUIDE_NO_CUDA", "1")
    assert build.cuda_module() is None
    assert "CALGUIDE_NO_CUDA is set" in capsys.readouterr().out
    monkeypatch.setenv("CALGUIDE_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="CALGUIDE_FORCE_CUDA is set, and CALGUIDE_NO_CUDA is set"):
        build.cuda_module()


@pytest.mark.parametrize("optional", [True, False])
def test_a_failed_compilation_is_fatal_only_if_forced(build, monkeypatch, tmp_path, capfd, caplog, optional):
    fake_nvcc(tmp_path, "echo 'nvcc: unsupported host compiler' >&2; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    extension = build.Extension("calguide_fast._cuda", ["csrc/cuda/step.cu"], optional=optional)
    distribution = Distribution({"name": "probe", "ext_modules": [extension]})
    command = build.NinjaBuildExt(distribution)
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.ensure_finalized()
    if optional:
        command.run()
        assert "unsupported host compiler" in capfd.readouterr().out
        assert "It is optional: the package is built without it" in caplog.text
    else:
        with pytest.raises(SystemExit, match="compiling calguide_fast._cuda failed"):
            command.run()
    assert not list((tmp_path / "lib").rglob("*.so"))
