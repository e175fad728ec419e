"""What only a GPU can tell, in one JSON file: build, tests, compute-sanitizer and, where asked for, benchmarks.

    python tools/gpu_check.py [--parts build,tests] [--out FILE] [--limit SECONDS]

Each part runs in processes of its own and has its own limit of time. Where a single call may last ten minutes, make two
of them: --parts build,tests and --parts triton,sanitizer. Parts that are run one by one for the same GPU and the same
state of the code are gathered in the same file; where git does not tell that state, only those of one call. The exit
status is 0 if every part that was run is in order, 1 if one is not, and 2 if there is no GPU.
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
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("calguide_fast", "csrc", "tests", "tools", "setup.py", "pyproject.toml")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]

# seconds; Triton compiles each of its kernels' variants, so that its tests stand apart
LIMITS = {"build": 200, "tests": 200, "triton": 300, "sanitizer": 250, "bench": 500}
# the benchmarks take as long as all else, so they are asked for
DEFAULT = ("build", "tests", "triton", "sanitizer")
# for a command that is stopped to say what it found
GRACE = 10
# processes that compile Triton's variants side by side, where pytest-xdist is installed
PROCESSES = 8
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run(command: list[str], limit: float, **environment: str) -> dict[str, Any]:
    """The outcome of a command: whether it succeeded, its time, the end of its output.

    Past the limit it is interrupted, which lets pytest report what it has found so far; and, should it go on, killed.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit, 0.1))
        status = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        # the command and whatever it started
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE)
            status = f"interrupted after {limit:.0f} s"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = f"killed after {limit:.0f} s"
    return {
        "ok": status == "exit status 0",
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(command),
        "output": output[-4000:],
    }


def build(limit: float) -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    # machine code for this GPU alone, unless others are asked for; and no silent build without CUDA
    architectures = os.environ.get("CALGUIDE_CUDA_ARCHS") or f"{major}{minor}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run(command, limit, CALGUIDE_CUDA_ARCHS=architectures, CALGUIDE_FORCE_CUDA="1")


def tests(limit: float) -> dict[str, Any]:
    return pytest_part(["-k", "not triton"], limit)


def triton(limit: float) -> dict[str, Any]:
    return pytest_part(["-k", "triton", *side_by_side()], limit)


def side_by_side() -> list[str]:
    """Options of pytest; none where pytest-xdist is not installed."""
    return ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") is not None else []


def pytest_part(selection: list[str], limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        result = run([*PYTEST, "tests", "-m", "gpu", *selection, f"--junit-xml={report}"], limit)
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


def sanitizer(limit: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {
            "ok": False,
            "status": "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin",
            "seconds": 0.0,
        }
    start = time.monotonic()
    results: dict[str, Any] = {}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "99", "--target-processes", "all"]
        command += [*PYTEST, "tests/gpu", "-m", "sanitizer"]
        left = limit - (time.monotonic() - start)
        if left <= 0:
            results[name] = {"ok": False, "status": "not started: no time was left", "seconds": 0.0}
            continue
        # every tensor an allocation of its own, so that a step beyond it is seen
        results[name] = run(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        results[name] |= sanitizer_summary(results[name]["output"])
        results[name]["ok"] = results[name]["ok"] and results[name].get("errors") == 0
    ok = all(result["ok"] for result in results.values())
    return {"ok": ok, "seconds": round(time.monotonic() - start, 1), "tools": results}


def sanitizer_summary(output: str) -> dict[str, int]:
    """The tool's own count of errors (racecheck's: of hazards), which it prints last."""
    counts = re.findall(r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return {"errors": sum(int(errors or hazards) for errors, hazards in counts)} if counts else {}


def bench(limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmarks.json"
        result = run([*PYTEST, "benchmarks", "--benchmark-only", f"--benchmark-json={report}"], limit)
        if report.exists() and report.stat().st_size:
            result["rows"] = benchmark_rows(json.loads(report.read_text()))
    return result


def benchmark_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What each benchmark recorded of itself, and its median."""
    return [
        {"name": row["name"], "group": row["group"], "median_us": row["stats"]["median"] * 1e6, **row["extra_info"]}
        for row in report["benchmarks"]
    ]


PARTS = {"build": build, "tests": tests, "triton": triton, "sanitizer": sanitizer, "bench": bench}


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


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(DEFAULT), help=f"of {','.join(PARTS)} (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/<gpu>-<commit>.json)")
    parser.add_argument("--limit", type=float, help=f"seconds for each part (default: {LIMITS})")
    options = parser.parse_args(given)
    options.parts = [part.strip() for part in options.parts.split(",")]
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is present, and all that is checked here needs one", file=sys.stderr)
        return 2
    # a shell's background job ignores interruptions, and so would whatever is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (longest := sum(options.limit or LIMITS[name] for name in options.parts)) > 600:
        print(f"gpu-check: this may last {longest:.0f} s; where a call may last 600, run --parts build,tests and")
        print("gpu-check: --parts triton,sanitizer apart")
    found, parts = machine(), {}
    path = options.out or default_path(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (name for name in PARTS if name in options.parts):
        print(f"gpu-check: {name} …", flush=True)
        parts[name] = PARTS[name](options.limit or LIMITS[name])
        print(f"gpu-check: {name}: {'in order' if parts[name]['ok'] else 'FAILED'}, {parts[name]['seconds']} s")
        if not parts[name]["ok"]:
            print(json.dumps(parts[name], indent=1, ensure_ascii=False)[:3000])
        # after each part, so that what was found stays if the next is cut short
        write(path, gathered(path, found, parts))
    print(f"gpu-check: written to {path}")
    return 0 if all(part["ok"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
