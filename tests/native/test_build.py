"""What the build promises: safe instruction-set variants, one OpenMP runtime, errors that say what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setup_script

from calguide_fast.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    return setup_script.load()


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists an object's symbols, is not installed")
@pytest.mark.skipif(cpu._cpu.isas()[0] == "baseline", reason="only one instruction set here: nothing to mix up")
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_kernels_share_no_code_between_instruction_sets(build, source, tmp_path):
    isa = cpu._cpu.isas()[0]
    target = tmp_path / "kernel.o"
    # less inlining than in the real build makes more functions that could be shared
    command = [*build.kernel_command(source, isa, build.openmp_flags()), "-O1", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", "--defined-only", str(target)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[1:] for line in listing.splitlines()]
    shared = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
    assert shared, "the kernel defines no entry point"
    assert all(f"N8calguide2{isa}" in name for name in shared), shared
    assert not [name for kind, name in symbols if kind in "VvWwu"]


def test_no_kernel_source_is_missed():
    assert "guidance" in [source.stem for source in KERNELS]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what a process has loaded")
def test_one_openmp_runtime():
    code = (
        "import torch\n"
        "from calguide_fast import _cpu\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print([p for p in paths if 'gomp' in p or 'iomp' in p or 'libomp' in p])\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout)) == 1, done.stdout


@pytest.mark.parametrize("isa", cpu._cpu.isas())
def test_instruction_set_can_be_chosen(isa):
    code = "from calguide_fast.backends import cpu\nprint(cpu._cpu.isa())\nprint(cpu.describe())"
    done = run(code, CALGUIDE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    named, described = done.stdout.splitlines()
    assert named == isa
    assert described.startswith("C++, ") and isa in described
    assert ("OpenMP" in described) == cpu._cpu.openmp()


def test_unknown_instruction_set_is_an_import_error():
    done = run("import torch\nfrom calguide_fast import _cpu", CALGUIDE_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "ImportError: CALGUIDE_CPU_ISA is 'sse9'; this machine and build can run: " in done.stderr


def test_missing_compiler_says_what_to_install(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="needs a C\\+\\+17 compiler.*no-such-compiler.*apt install g\\+\\+"):
        build.cxx()


def test_missing_python_headers_say_what_to_install(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=f"Python.h in {re.escape(str(tmp_path))} is missing.*apt install python3-dev"):
        build.cpu_module()


def test_ninja_leaves_nothing_where_it_is_started(build, monkeypatch, tmp_path):
    started, folder, source = tmp_path / "started", tmp_path / "a $ folder", tmp_path / "empty.cpp"
    started.mkdir()
    folder.mkdir()
    source.write_text("")
    monkeypatch.chdir(started)
    module = build.NativeModule("empty", [(source, "empty.o", build.cxx())], [*build.cxx(), "-shared"])
    script = build.write_ninja(module, folder / "empty.so", folder)
    subprocess.run([sys.executable, "-m", "ninja", "-f", str(script)], check=True, capture_output=True)
    assert (folder / "empty.so").exists() and (folder / ".ninja_log").exists()
    assert not list(started.iterdir())


def test_compiler_without_openmp_still_builds(build, monkeypatch, capsys):
    accepts = build.accepts
    monkeypatch.setattr(build, "accepts", lambda flags, *source: "-fopenmp" not in flags and accepts(flags, *source))
    module = build.cpu_module()
    assert "-fopenmp" not in module.link
    assert not any("-fopenmp" in command for _, _, command in module.objects)
    assert "one thread" in capsys.readouterr().out
