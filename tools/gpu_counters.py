"""What the hardware counts of each kernel: Nsight Compute on one call of every target of benchmarks/gpu_targets.py.

    python tools/gpu_counters.py [--out FILE.json] [--seconds 110] [--backends cuda,triton]

runs itself under ncu (--workload) and writes duration, bytes of memory, occupancy, registers and local memory of each
kernel. Clocks stay as they are. What ncu wrote itself is kept beside it as FILE.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# of csrc/cuda, of backends/triton, and the mark
KERNELS = "guide_|guidance_kernel|step_kernel|prepare_|deposit_|column_waves|moments_|search_kernel|spin_kernel"
# stands between the targets
MARK = "spin_kernel"
# ours to read: ncu's metric and what it is
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
    "local_loads": "smsp__inst_executed_op_local_ld.sum",
    "local_stores": "smsp__inst_executed_op_local_st.sum",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}


def workload(backends: Sequence[str]) -> None:
    """Every target once, warm, each between two marks; only these are looked at."""
    import torch
    from gpu_targets import TARGETS

    from calguide_fast import use_backend

    device = torch.device("cuda", 0)
    for backend in backends:
        for target in TARGETS:
            with use_backend(backend):
                inputs = target.inputs(device)
                for _ in range(2):
                    target.call(*inputs)
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
                target.call(*inputs)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            del inputs
            torch.cuda.empty_cache()


def order(backends: Sequence[str]) -> list[str]:
    from gpu_targets import TARGETS

    return [f"{target.name} ({backend})" for backend in backends for target in TARGETS]


def ncu() -> str | None:
    """The profiler: that on PATH, else the newest below the usual folders."""
    found = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if found is None:
        others = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
        found = str(others[-1]) if others else None
    return found


def command(tool: str, backends: Sequence[str]) -> list[str]:
    return [
        tool,
        "--clock-control=none",
        "--profile-from-start=off",
        f"--kernel-name=regex:{KERNELS}",
        f"--metrics={','.join(METRICS.values())}",
        "--csv",
        "--page=raw",
        "--print-units=base",
        sys.executable,
        str(Path(__file__).resolve()),
        "--workload",
        f"--backends={','.join(backends)}",
    ]


def kernels_in(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """ncu's raw page as rows: target, kernel, and the metrics that it could read.

    Args:
        text: its output: messages, a line of headings, a line of units, and one line for each kernel.
        names: of the targets, in the order in which the marks announce them.
    """
    lines = text.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    rows: list[dict[str, Any]] = []
    seen = -1
    for row in csv.DictReader(lines[begin:]):
        kernel = row.get("Kernel Name") or ""
        if not (row.get("ID") or "").isdigit():
            # units, or a message among the lines
            continue
        if MARK in kernel:
            seen += 1
            continue
        numbers = {name: number(row.get(metric)) for name, metric in METRICS.items()}
        if numbers["us"] is not None:
            # base units are nanoseconds
            numbers["us"] /= 1e3
        target = names[seen] if 0 <= seen < len(names) else None
        rows.append({"target": target, "kernel": kernel, **numbers})
    return rows


def number(text: str | None) -> float | None:
    """A metric's value; None where there is none, as for what this GPU does not count."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-counters.json", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=110, help="stop ncu after this long (default: %(default)s)")
    parser.add_argument("--backends", default="cuda,triton", help="default: %(default)s")
    parser.add_argument("--workload", action="store_true", help="what ncu looks at")
    options = parser.parse_args(given)
    backends = options.backends.split(",")
    if options.workload:
        workload(backends)
        return 0
    tool = ncu()
    if tool is None:
        print("gpu-counters: ncu (Nsight Compute) is neither on PATH nor where CUDA installs it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".csv")
    with kept.open("w") as stream:
        process = subprocess.Popen(
            command(tool, backends), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = f"exit status {process.wait(timeout=options.seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"killed after {options.seconds:.0f} s"
    text = kept.read_text(errors="replace")
    rows = kernels_in(text, order(backends))
    options.out.write_text(
        json.dumps({"tool": tool, "status": status, "metrics": METRICS, "rows": rows}, indent=1) + "\n"
    )
    for row in rows:
        print(
            f"{row['target']}: {row['kernel'][:48]}: {row['us']} us, DRAM {row['dram_percent']} %, "
            f"warps {row['occupancy_percent']} %, issue {row['issue_percent']} %, {row['registers']} registers"
        )
    if not rows:
        print(f"gpu-counters: {status}; ncu read nothing:\n{text[-1500:]}", file=sys.stderr)
    return 0 if rows and status == "exit status 0" else 1


if __name__ == "__main__":
    sys.exit(main())
