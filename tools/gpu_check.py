"""What only a GPU can tell, in one JSON file: build, tests, compute-sanitizer, and how fast.

    python tools/gpu_check.py [--call right | --parts build,tests] [--out FILE] [--logs FOLDER] [--limit SECONDS]
    python tools/gpu_check.py --plan

Each part runs in processes of its own, has its own limit of time, and writes its log as it goes. Where a single call
may last ten minutes, make three of them, which --plan lists: --call right, --call fast and --call whole. Parts that are
run one by one for the same GPU and the same state of the code are gathered in the same file; where git does not tell
that state, only those of one call. The exit status is 0 if every part that was run is in order, 1 if one is not, and 2
if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("calguide_fast", "csrc", "tests", "tools", "setup.py", "pyproject.toml")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]

# seconds; Triton compiles each of its kernels' variants, so that its tests stand apart
LIMITS = {
    "build": 90,
    "tests": 110,
    "triton": 200,
    "resources": 15,
    "sanitizer": 160,
    "targets": 200,
    "counters": 80,
    "end_to_end": 270,
    "tune": 160,
    "bench": 500,
}
# what fits ten minutes, and answers one question; the module is built where it is not there
CALLS = {
    "right": ("build", "tests", "triton", "resources"),
    "fast": ("build", "sanitizer", "targets", "counters"),
    "whole": ("build", "end_to_end", "tune"),
}
DEFAULT = ("build", "tests", "triton", "sanitizer")
# for a command that is stopped to say what it found
GRACE = 10
# processes that share out tests, where pytest-xdist is installed
PROCESSES = 8
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# PyTorch takes longer to begin than the tools wait by themselves, and some of CUDA's answers to what it asks are errors
PATIENT = ("--launch-timeout=0", "--report-api-errors=no")


def run(command: list[str], limit: float, log: Path, **environment: str) -> dict[str, Any]:
    """The outcome of a command: whether it succeeded, its time, the end of its output, all of which goes to the log.

    Past the limit it is interrupted, which lets pytest report what it has found so far; and, should it go on, killed.
    """
    start = time.monotonic()
    # a file, not a pipe: what was written stays, whatever becomes of this process
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = f"exit status {process.wait(timeout=max(limit, 0.1))}"
    except subprocess.TimeoutExpired:
        # the command and whatever it started
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=GRACE)
            status = f"interrupted after {limit:.0f} s"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"killed after {limit:.0f} s"
    return {
        "ok": status == "exit status 0",
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(command),
        "output": log.read_text(errors="replace")[-4000:],
    }


def build(limit: float, logs: Path) -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    # machine code for this GPU alone, unless others are asked for; and no silent build without CUDA
    architectures = os.environ.get("CALGUIDE_CUDA_ARCHS") or f"{major}{minor}"
    state = f"{built_from()} for {architectures}"
    stamp = ROOT / "build" / "gpu-check"
    if all(module.exists() for module in native_modules()) and stamp.exists() and stamp.read_text() == state:
        return {"ok": True, "status": "the modules are there, built from these sources", "seconds": 0.0}
    stamp.unlink(missing_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = run(command, limit, logs / "build.log", CALGUIDE_CUDA_ARCHS=architectures, CALGUIDE_FORCE_CUDA="1")
    if result["ok"]:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(state)
    return result


def native_modules() -> list[Path]:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [ROOT / "calguide_fast" / f"{name}{suffix}" for name in ("_cpu", "_cuda")]


def built_from() -> str:
    """A name for all that the native modules are made of."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in (ROOT / "setup.py", *files))).hexdigest()[:16]


def tests(limit: float, logs: Path) -> dict[str, Any]:
    return pytest_part(["-k", "not triton"], limit, logs / "tests.log")


def triton(limit: float, logs: Path) -> dict[str, Any]:
    return pytest_part(["-k", "triton"], limit, logs / "triton.log")


def side_by_side() -> list[str]:
    """Options of pytest; none where pytest-xdist is not installed."""
    return ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") is not None else []


def pytest_part(selection: list[str], limit: float, log: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*PYTEST, "tests", "-m", "gpu", *selection, *side_by_side(), f"--junit-xml={report}"]
        result = run(command, limit, log)
        result |= junit_summary(report)
    # a run in which nothing was left to do shows nothing
    result["ok"] = result["ok"] and result.get("passed", 0) > 0
    return result


def junit_summary(report: Path) -> dict[str, Any]:
    """Counts, the failures' names and first lines, and why tests were skipped; nothing if pytest wrote no whole report.

    Of a run that was interrupted these are the tests before that.
    """
    try:
        suites = ElementTree.parse(report)
    except (FileNotFoundError, ElementTree.ParseError):
        return {}
    failures: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for case in suites.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failures[name] = (found.get("message") or "").partition("\n")[0]
        if (found := case.find("skipped")) is not None:
            reason = found.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
    # by pytest's own count, which leaves out the one that was interrupted
    ended = sum(int(suite.get("tests", 0)) for suite in suites.iter("testsuite"))
    passed = ended - len(failures) - sum(skipped.values())
    return {"passed": passed, "failed": len(failures), "failures": failures, "skipped": skipped}


def cuda_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def absent(tool: str) -> dict[str, Any]:
    return {"ok": False, "status": f"{tool} is neither on PATH nor in /usr/local/cuda/bin", "seconds": 0.0}


def resources(limit: float, logs: Path) -> dict[str, Any]:
    """Registers, stack, shared and local memory of every kernel that was built."""
    tool = cuda_tool("cuobjdump")
    if tool is None:
        return absent("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        result = run([tool, "--dump-resource-usage", str(native_modules()[1])], limit, report)
        kernels = kernel_resources(report.read_text(errors="replace"))
    demangler = shutil.which("c++filt")
    if demangler is not None and kernels:
        mangled = "\n".join(kernel["kernel"] for kernel in kernels)
        names = subprocess.run([demangler], input=mangled, capture_output=True, text=True).stdout.splitlines()
        for kernel, name in zip(kernels, names):
            kernel["kernel"] = name
    spilling = [kernel["kernel"] for kernel in kernels if kernel["stack"] or kernel["local"]]
    return result | {"ok": result["ok"] and bool(kernels), "kernels": kernels, "spilling": spilling, "output": ""}


def kernel_resources(text: str) -> list[dict[str, Any]]:
    """cuobjdump's report as rows."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    names = ("kernel", "registers", "stack", "shared", "local")
    return [dict(zip(names, (name, *map(int, numbers)))) for name, *numbers in re.findall(pattern, text)]


def sanitizer(limit: float, logs: Path) -> dict[str, Any]:
    """The four tools side by side: most of their time is the host's."""
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        return absent("compute-sanitizer")
    start = time.monotonic()

    def watched(name: str, log: Path) -> dict[str, Any]:
        command = [tool, "--tool", name, "--error-exitcode", "99", "--target-processes", "all", *PATIENT]
        command += [*PYTEST, "tests/gpu", "-m", "sanitizer"]
        # every tensor an allocation of its own, so that a step beyond it is seen
        result = run(command, limit, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        result |= sanitizer_summary(result["output"])
        result["ok"] = result["ok"] and result.get("errors") == 0
        return result

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(SANITIZERS)) as pool:
        found = [Path(folder) / name for name in SANITIZERS]
        results = dict(zip(SANITIZERS, pool.map(watched, SANITIZERS, found)))
        # one file of all, as few may come back from where the GPU is
        (logs / "sanitizer.log").write_text("\n".join(log.read_text(errors="replace") for log in found))
    ok = all(result["ok"] for result in results.values())
    return {"ok": ok, "seconds": round(time.monotonic() - start, 1), "tools": results}


def sanitizer_summary(output: str) -> dict[str, int]:
    """The tool's own count of errors (racecheck's: of hazards), which it prints last."""
    counts = re.findall(r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return {"errors": sum(int(errors or hazards) for errors, hazards in counts)} if counts else {}


def targets(limit: float, logs: Path) -> dict[str, Any]:
    """The ops at sizes that fill a GPU; what was measured before an interruption is kept."""
    result = benchmarks("benchmarks/test_gpu_targets.py", limit, logs / "targets")
    for row in result.get("rows", []):
        print(target_line(row), flush=True)
    return result


def bench(limit: float, logs: Path) -> dict[str, Any]:
    return benchmarks("benchmarks", limit, logs / "bench")


def benchmarks(what: str, limit: float, beside: Path) -> dict[str, Any]:
    report = beside.with_suffix(".json")
    report.unlink(missing_ok=True)
    # a file whose peers are not installed stops no other file
    command = [*PYTEST, what, "--continue-on-collection-errors", "--benchmark-only", f"--benchmark-json={report}"]
    result = run(command, limit, beside.with_suffix(".log"))
    if report.exists() and report.stat().st_size:
        result["rows"] = benchmark_rows(json.loads(report.read_text()))
    return result


def target_line(row: dict[str, Any]) -> str:
    """What was aimed at, foreseen and seen."""
    if "ours_us" not in row:
        return f"{row['group']}: {row.get('us')}"
    seen = row.get("graph_ours_us") or row["ours_us"]
    ratio = row.get("graph_ratio") or row["ratio"]
    line = f"{row['group']}: {seen:.4g} us"
    if row.get("predicted_us"):
        line += f" (foreseen {row['predicted_us']:g})"
    if row.get("share_of_copy"):
        share = row["share_of_copy"] * row["ours_us"] / seen
        line += f", {share:.0%} of a copy" + ("" if row.get("aim_share") is None else f" (aim {row['aim_share']:.0%})")
    if row.get("aim_us"):
        line += f", aim {row['aim_us']:g} us"
    return f"{line}; {row['peer']} {ratio:.2f} x"


def counters(limit: float, logs: Path) -> dict[str, Any]:
    # its own limit is the shorter, so that it says what ncu wrote
    return script("gpu_counters", "tools/gpu_counters.py", limit - GRACE, limit, logs)


def end_to_end(limit: float, logs: Path) -> dict[str, Any]:
    return script("end_to_end", "benchmarks/end_to_end.py", limit - 40, limit, logs)


def tune(limit: float, logs: Path) -> dict[str, Any]:
    return script("gpu_tune", "tools/gpu_tune.py", limit - 30, limit, logs)


def script(name: str, file: str, seconds: float, limit: float, logs: Path) -> dict[str, Any]:
    """A script of ours that writes its results as it goes, and begins nothing after so many seconds."""
    report = logs / f"{name}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, file, "--out", str(report), "--seconds", f"{max(1.0, seconds):.0f}"]
    # the package may be built here and installed nowhere
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = run(command, limit, logs / f"{name}.log", PYTHONPATH=path)
    if report.exists():
        result["results"] = json.loads(report.read_text())
    return result


def benchmark_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What each benchmark recorded of itself, and its median."""
    return [
        {"name": row["name"], "group": row["group"], "median_us": row["stats"]["median"] * 1e6, **row["extra_info"]}
        for row in report["benchmarks"]
    ]


PARTS = {
    "build": build,
    "tests": tests,
    "triton": triton,
    "resources": resources,
    "sanitizer": sanitizer,
    "targets": targets,
    "counters": counters,
    "end_to_end": end_to_end,
    "tune": tune,
    "bench": bench,
}


def machine() -> dict[str, Any]:
    """The GPU and the versions of what runs on it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": output_of("git", "rev-parse", "--short=12", "HEAD"),
        "changes": changes(),
    }


def changes() -> str | None:
    """A name for what differs from the commit, in files that git knows and in new ones beside them; None if nothing."""
    difference = output_of("git", "diff", "--binary", "HEAD") or ""
    new = output_of("git", "ls-files", "--others", "--exclude-standard", "--", *SOURCES) or ""
    if not difference and not new:
        return None
    digest = hashlib.sha256(difference.encode())
    for name in new.splitlines():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def output_of(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_path(found: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    state = "-".join(filter(None, (found["commit"] or "unknown", found["changes"])))
    return ROOT / "benchmarks" / "results" / f"{name}-{state}.json"


def gathered(path: Path, found: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """The new results, with those of other parts that the file holds of the same machine and state of the code."""
    earlier = results_in(path)
    kept = earlier["parts"] if found["commit"] is not None and earlier.get("machine") == found else {}
    parts = {name: (kept | parts)[name] for name in PARTS if name in kept | parts}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"ok": all(part["ok"] for part in parts.values()), "date": date, "machine": found, "parts": parts}


def results_in(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if there is none, or if it holds no results."""
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"gpu-check: {path} is damaged ({error}) and is written anew", file=sys.stderr)
        return {}
    return held if isinstance(held, dict) and isinstance(held.get("parts"), dict) else {}


def write(path: Path, results: dict[str, Any]) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def plan() -> str:
    """What each call holds, and how long it may last."""
    lines = []
    for call, parts in CALLS.items():
        whole = sum(LIMITS[part] + GRACE for part in parts)
        lines.append(f"--call {call}: at most {whole} s")
        lines += [f"  {part:<11} {LIMITS[part]:>4} s" for part in parts]
    return "\n".join(lines)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--parts", default=",".join(DEFAULT), help=f"of {','.join(PARTS)} (default: %(default)s)")
    chosen.add_argument("--call", choices=CALLS, help="the parts of one call of ten minutes")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/<gpu>-<commit>.json)")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "gpu-check", help="folder (default: %(default)s)")
    parser.add_argument("--limit", type=float, help=f"seconds for each part (default: {LIMITS})")
    parser.add_argument("--plan", action="store_true", help="list the calls and their limits, and run nothing")
    options = parser.parse_args(given)
    options.parts = list(CALLS[options.call]) if options.call else [part.strip() for part in options.parts.split(",")]
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.plan:
        print(plan())
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is present, and all that is checked here needs one", file=sys.stderr)
        return 2
    # a shell's background job ignores interruptions, and so would whatever is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (longest := sum(options.limit or LIMITS[name] for name in options.parts)) > 600:
        print(f"gpu-check: this may last {longest:.0f} s; where a call may last 600, see --plan")
    found, parts = machine(), {}
    path = options.out or default_path(found)
    for folder in (path.parent, options.logs):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (name for name in PARTS if name in options.parts):
        print(f"gpu-check: {name} …", flush=True)
        parts[name] = PARTS[name](options.limit or LIMITS[name], options.logs.absolute())
        seconds = parts[name]["seconds"]
        print(f"gpu-check: {name}: {'in order' if parts[name]['ok'] else 'FAILED'}, {seconds} s", flush=True)
        if not parts[name]["ok"]:
            print(json.dumps(parts[name], indent=1, ensure_ascii=False)[:3000])
        # after each part, so that what was found stays if the next is cut short
        write(path, gathered(path, found, parts))
    print(f"gpu-check: written to {path}")
    return 0 if all(part["ok"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
