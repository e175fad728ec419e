"""Compile the native modules with ninja. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# NaN and infinity must stay what they are, so nothing of -ffast-math that assumes them away
FLOAT_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
# a switch over an enum leaves none of its values out
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *FLOAT_FLAGS, "-Wall", "-Werror=switch"]

# each kernel source is compiled once per instruction set; the widest one the machine has is chosen at run time
ISA_FLAGS = {
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v3": ["-march=x86-64-v3"],
    "baseline": [],
}

# GPU generations to make machine code for, as far as nvcc knows them: Turing, Ampere and Ada, Hopper, two of Blackwell
CUDA_ARCHS = ["75", "80", "90", "100", "120"]

# sources whose every multiply and add must round by itself, so that all machines give the same bits
NO_CONTRACTION = {"step.cpp", "tilt.cpp"}


@dataclass
class NativeModule:
    """One extension module: its objects as (source, object name, compiler command), and the command that links them."""

    name: str
    objects: list[tuple[Path, str, list[str]]]
    link: list[str]


def cxx() -> list[str]:
    """The C++ compiler command: $CXX, else the first of g++, clang++ and c++."""
    command = shlex.split(os.environ.get("CXX", ""))
    for candidate in [command] if command else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return candidate
    wanted = f"CXX={' '.join(command)}" if command else "g++, clang++ or c++"
    raise SystemExit(
        f"calguide_fast needs a C++17 compiler to install and found none ({wanted} is not on PATH). "
        "Install one (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx; "
        "macOS: xcode-select --install) or name it in CXX."
    )


def accepts(flags: list[str], source: str = "int main() { return 0; }\n") -> bool:
    """Whether the compiler builds a program with these flags, and links it unless they say -c."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe.cpp"
        program.write_text(source)
        command = [*cxx(), "-std=c++17", *flags, str(program), "-o", str(program.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def python_include() -> str:
    """The folder of Python's own headers, which distributions package apart from Python."""
    folder = sysconfig.get_path("include")
    if accepts(["-c", f"-I{folder}"], "#include <Python.h>\n"):
        return folder
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise SystemExit(
        f"calguide_fast needs Python's headers to install, and Python.h in {folder} is missing or does not compile. "
        f"Install them (Debian/Ubuntu: apt install python3-dev or python{version}-dev; "
        "Fedora: dnf install python3-devel) or use a Python that has them (conda, python.org, uv)."
    )


def openmp_flags() -> list[str]:
    """Threads where the compiler has OpenMP, else (Apple's clang) vectorisation pragmas only."""
    if accepts(["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"):
        return ["-fopenmp"]
    print("calguide_fast: this compiler has no OpenMP; the CPU kernels will use one thread")
    return ["-fopenmp-simd"] if accepts(["-fopenmp-simd"]) else []


def kernel_isas() -> list[str]:
    """Instruction sets to compile kernels for, widest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    return [isa for isa, flags in ISA_FLAGS.items() if accepts(flags)]


def kernel_command(source: Path, isa: str, openmp: list[str]) -> list[str]:
    """Command that compiles one kernel source for one instruction set, short of -c, the source and the output."""
    contraction = ["-ffp-contract=off"] if source.name in NO_CONTRACTION else ["-ffp-contract=fast"]
    # no kernel throws, and a handler's support code would be shared between the instruction sets
    flags = [*CXX_FLAGS, "-fno-exceptions", *openmp, *ISA_FLAGS[isa], *contraction]
    return [*cxx(), *flags, f"-DCALGUIDE_ISA={isa}", f"-I{CSRC}"]


def cpu_module() -> NativeModule:
    """`calguide_fast._cpu`: csrc/cpu/kernels once per instruction set, the rest of csrc/cpu and the bindings once."""
    openmp, isas = openmp_flags(), kernel_isas()
    objects = [
        (source, f"{source.stem}.{isa}.o", kernel_command(source, isa, openmp))
        for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp"))
        for isa in isas
    ]
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{python_include()}"]
    has_isa = [f"-DCALGUIDE_HAS_{isa.upper()}" for isa in isas]
    host = [*cxx(), *CXX_FLAGS, *openmp, "-ffp-contract=off", *has_isa, *includes]
    host_sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    objects += [(source, f"{source.stem}.o", host) for source in host_sources]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return NativeModule("calguide_fast._cpu", objects, [*cxx(), *shared, *(f for f in openmp if f == "-fopenmp")])


def nvcc() -> str | None:
    """The CUDA compiler: that of $CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_archs(known: list[str]) -> tuple[list[str], list[str]]:
    """Architectures to make machine code for, and those to add PTX of, which newer GPUs translate.

    CALGUIDE_CUDA_ARCHS names them, such as "80;90" or "8.0 9.0+PTX"; else those of CUDA_ARCHS that nvcc knows, and PTX
    of the newest.
    """
    named = [name for name in re.split(r"[\s;,]+", os.environ.get("CALGUIDE_CUDA_ARCHS", "")) if name]
    archs = [name.replace(".", "").removesuffix("+PTX") for name in named]
    unknown = [arch for arch in archs if arch not in known]
    if unknown:
        raise SystemExit(f"CALGUIDE_CUDA_ARCHS asks for {', '.join(unknown)}; this nvcc knows {', '.join(known)}")
    if not archs:
        archs = [arch for arch in CUDA_ARCHS if arch in known] or known[-1:]
        return archs, archs[-1:]
    return archs, [arch for arch, name in zip(archs, named) if name.endswith("+PTX")]


def cuda_module() -> NativeModule | None:
    """`calguide_fast._cuda`: csrc/cuda by nvcc, with CUDA's runtime inside; None where CUDA is not to be built."""
    force = bool(os.environ.get("CALGUIDE_FORCE_CUDA"))

    def leave_out(reason: str) -> None:
        if force:
            raise SystemExit(f"CALGUIDE_FORCE_CUDA is set, and {reason}")
        print(f"calguide_fast: {reason}; building without CUDA kernels")

    if os.environ.get("CALGUIDE_NO_CUDA"):
        return leave_out("CALGUIDE_NO_CUDA is set")
    compiler = nvcc()
    if compiler is None:
        return leave_out("nvcc is neither in $CUDA_HOME/bin nor on PATH")
    listing, release = (
        subprocess.run([compiler, question], capture_output=True, text=True).stdout
        for question in ("--list-gpu-code", "--version")
    )
    known, version = re.findall(r"sm_(\w+)", listing), re.search(r"release (\d+)", release)
    if not known or not version:
        return leave_out(f"{compiler} does not say what it compiles for")
    archs, ptx = cuda_archs(known)

    host = ["-ccbin", cxx()[0]] if os.environ.get("CXX") else []
    common = [compiler, *host, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(arch, f"compute_{arch}") for arch in ptx]
    kernels = [*common, *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets)]
    if int(version[1]) >= 13:
        # a sixth of the size, for the drivers that this release needs anyway
        kernels.append("--compress-mode=size")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    objects = [(source, f"{source.stem}.o", kernels) for source in sources]
    # nvcc would cut a list at its commas
    defines = [
        f"-DCALGUIDE_CUDA_{kind}={''.join('_' + re.sub('[a-z]', '', arch) for arch in built)}"
        for kind, built in (("MACHINE_CODE", archs), ("PTX", ptx or ["0"]))
    ]
    # as system headers, whose warnings are not ours
    bindings = [*common, *defines, f"-isystem={pybind11.get_include()}", f"-isystem={python_include()}"]
    objects.append((CSRC / "cuda" / "bindings.cpp", "bindings.o", bindings))
    return NativeModule("calguide_fast._cuda", objects, [compiler, *host, "-shared", "-cudart=static"])


def write_ninja(module: NativeModule, target: Path, folder: Path) -> Path:
    """Write the module's build.ninja into `folder`."""
    path = folder / "build.ninja"
    with path.open("w") as stream:
        ninja = Writer(stream, width=10000)
        # where ninja keeps its log, else the folder it was started in
        ninja.variable("builddir", str(folder).replace("$", "$$"))
        ninja.rule("compile", "$compiler -c $in -o $out", description="compile $out")
        ninja.rule("link", "$linker $in -o $out", description="link $out")
        outputs = []
        for source, name, command in module.objects:
            outputs.append(str(folder / name))
            ninja.build(outputs[-1], "compile", str(source), variables={"compiler": quote(command)})
        ninja.build(str(target), "link", outputs, variables={"linker": quote(module.link)})
    return path


def quote(command: list[str]) -> str:
    """A command line as a ninja variable."""
    return shlex.join(command).replace("$", "$$")


class NinjaBuildExt(build_ext):
    """build_ext that hands each module to ninja, from an empty folder every time."""

    def build_extension(self, ext: Extension) -> None:
        module = self.modules[ext.name]
        folder = Path(self.build_temp).resolve() / ext.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ninja", "-f", str(write_ninja(module, target, folder))]
        jobs = os.environ.get("MAX_JOBS")
        if subprocess.run(command + (["-j", jobs] if jobs else [])).returncode:
            message = f"calguide_fast: compiling {ext.name} failed; the compiler's own message is above"
            if not ext.optional:
                raise SystemExit(message)
            # setuptools tells it and goes on, without what it may have left
            target.unlink(missing_ok=True)
            raise CompileError(f"{message}. It is optional: the package is built without it")

    def build_extensions(self) -> None:
        self.modules = {module.name: module for module in (cpu_module(), cuda_module()) if module is not None}
        self.extensions = [ext for ext in self.extensions if ext.name in self.modules]
        super().build_extensions()


class CleanBuild(build):
    """build that starts from an empty folder, so that files removed from the sources do not live on in a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":
    sources = sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.c*"))
    cpu = [source for source in sources if not source.startswith("csrc/cuda")]
    cuda = [source for source in sources if source.startswith("csrc/cuda")]
    setup(
        ext_modules=[
            Extension("calguide_fast._cpu", sources=cpu, language="c++"),
            Extension(
                "calguide_fast._cuda",
                sources=cuda,
                language="c++",
                optional=not os.environ.get("CALGUIDE_FORCE_CUDA"),
            ),
        ],
        cmdclass={"build": CleanBuild, "build_ext": NinjaBuildExt},
    )
