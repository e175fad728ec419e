"""Everything that only a GPU can tell, in one JSON file: build, tests, compute-sanitizer, benchmarks.

    python tools/gpu_check.py [--parts build,tests] [--out FILE] [--limit SECONDS]

Each part runs in processes of its own and has its own limit of time; all of them together stay below ten minutes.
Parts that are run one by one for the same GPU and commit are gathered in the same file. The exit status is 0 if every
part that was run is in order, 1 if one is not, and 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
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
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]

# seconds; Triton compiles each of its kernels' variants, so that its tests stand apart
LIMITS = {"build": 150, "tests": 110, "triton": 130, "sanitizer": 100, "bench": 90}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run(command: list[str], limit: float, **environment: str) -> dict[str, Any]:
    """The outcome of a command: whether it succeeded, its time, the end of its output. Past the limit it is killed."""
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
    return pytest_part("not triton", limit)


def triton(limit: float) -> dict[str, Any]:
    return pytest_part("triton", limit)


def pytest_part(selection: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        result = run([*PYTEST, "tests", "-m", "gpu", "-k", selection, f"--junit-xml={report}"], limit)
        result |= junit_summary(report)
    # a run in which nothing was left to do shows nothing
    result["ok"] = result["ok"] and result.get("passed", 0) > 0
    return result


def junit_summary(report: Path) -> dict[str, Any]:
    """Counts, the failures' names and first lines, and why tests were skipped; nothing if the run was cut short."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failures[name] = (found.get("message") or "").partition("\n")[0]
        if (found := case.find("skipped")) is not None:
            reason = found.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = len(cases) - len(failures) - sum(skipped.values())
    return {"passed": passed, "failed": len(failures), "failures": failures, "skipped": skipped}


def sanitizer(limit: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {
            "ok": False,
            "status": "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin",
            "seconds": 0.0,
        }
    start, results = time.monotonic(), {}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "99", "--target-processes", "all"]
        command += [*PYTEST, "tests/gpu", "-m", "sanitizer"]
        left = limit - (time.monotonic() - start)
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
        "changed": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
    }


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
    return ROOT / "benchmarks" / "results" / f"{name}-{found['commit'] or 'unknown'}.json"


def gathered(path: Path, found: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """The new results, with those of other parts that the file holds of the same machine and commit."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    kept = earlier.get("parts", {}) if earlier.get("machine") == found else {}
    parts = {name: (kept | parts)[name] for name in PARTS if name in kept | parts}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"ok": all(part["ok"] for part in parts.values()), "date": date, "machine": found, "parts": parts}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
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
        path.write_text(json.dumps(gathered(path, found, parts), indent=1, ensure_ascii=False) + "\n")
    print(f"gpu-check: written to {path}")
    return 0 if all(part["ok"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
