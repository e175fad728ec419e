"""Compile CUDA sources for the CPU: every object once, kept by its content in the folder for temporary files."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
EMULATOR = [HERE / "emulator.cpp", HERE / "host_functions.cpp"]

CXX = "g++"
# no symbol is shared between builds that one process loads; -g1 gives reports their line numbers
COMMON = ["-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-g1"]
WARNINGS = ["-Wall", "-Werror=switch", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def flags_for(source: Path, includes: Sequence[Path], sanitize: bool) -> list[str]:
    """Kernels are many and run little, the emulator is small and runs a lot, bindings only take long to compile."""
    if source in EMULATOR:
        return ["-O2", *(SANITIZERS if sanitize else [])]
    if b"#include <pybind11/" in b"".join(contents(source, includes)):
        built_for = ["-DCALGUIDE_CUDA_MACHINE_CODE=_80_90", "-DCALGUIDE_CUDA_PTX=_90"]
        return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *built_for]
    # without sanitizers, the emulator itself answers the check of alignment
    return ["-O0", *SANITIZERS] if sanitize else ["-O1", "-fsanitize=alignment"]


def cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"calguide_fast_emulation_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is someone else's"
    return folder


def contents(source: Path, includes: Sequence[Path] = ()) -> list[bytes]:
    """Of the source and all that it includes by name in quotation marks."""
    found, left = {}, [source.resolve()]
    while left:
        file = left.pop()
        if file in found:
            continue
        found[file] = file.read_bytes()
        for name in re.findall(rb'^\s*#include "([^"]+)"', found[file], re.MULTILINE):
            candidates = [folder / name.decode() for folder in (file.parent, *includes)]
            left += [path.resolve() for path in candidates if path.exists()][:1]
    return list(found.values())


def compile_object(source: Path, includes: Sequence[Path], flags: Sequence[str]) -> Path:
    command = [CXX, *COMMON, *WARNINGS, "-DCALGUIDE_EMULATION", *flags]
    # the project's folders count by what is in them, so that a copy of them finds its objects made
    key = hashlib.sha256(b"\0".join([shlex.join(command).encode(), *contents(source, includes)])).hexdigest()[:24]
    target = cache() / f"{source.stem}.{key}.o"
    if not target.exists():
        run([*command, *(f"-I{folder}" for folder in includes), "-c", str(source)], target)
    return target


def run(command: Sequence[str], target: Path) -> None:
    """Run a compiler; the target appears whole or not at all, whoever else makes it at the same time."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made"
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr}")
        os.replace(made, target)


def link(
    sources: Sequence[Path], includes: Sequence[Path], name: str, sanitize: bool, flags: Sequence[str] = ()
) -> Path:
    """A shared library of the sources and the emulator, in a folder of its own and called `name`."""
    if sys.platform != "linux" or not shutil.which(CXX):
        pytest.skip("CUDA is emulated by what g++ compiles on Linux")

    folders = [*includes, HERE]

    def compiled(source: Path) -> Path:
        return compile_object(source, folders, [*flags_for(source, folders, sanitize), *flags])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*sources, *EMULATOR]))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:24]
    target = cache() / key / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        run([CXX, "-shared", *(SANITIZERS if sanitize else []), *map(str, objects)], target)
    return target


def cuda_module(csrc: Path = CSRC, sanitize: bool = False) -> Path:
    """The extension module `_cuda` from the sources in `csrc`, which may be a changed copy."""
    sources = sorted([*(csrc / "cuda").glob("*.cu"), *(csrc / "cuda").glob("*.cpp")])
    return link(sources, [csrc], "_cuda" + sysconfig.get_config_var("EXT_SUFFIX"), sanitize)


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that can load what was built with `sanitize`; Python itself leaks on purpose."""
    print_name = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {**os.environ, "LD_PRELOAD": print_name.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


class Emulator:
    """A loaded library's settings: `seed`, `shared_limit`, `multiprocessors` and others of emulator.h."""

    def __init__(self, library: Path) -> None:
        self._setting = ctypes.CDLL(str(library)).calguide_emulator_setting
        self._setting.argtypes, self._setting.restype = [ctypes.c_char_p], ctypes.POINTER(ctypes.c_long)

    def __getitem__(self, name: str) -> int:
        return self._at(name)[0]

    def __setitem__(self, name: str, value: int) -> None:
        self._at(name)[0] = value

    def _at(self, name: str) -> ctypes._Pointer[ctypes.c_long]:
        found = self._setting(name.encode())
        if not found:
            raise KeyError(name)
        return found


def load_module(path: Path) -> ModuleType:
    """The extension module at `path`, beside any other of the same name."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
