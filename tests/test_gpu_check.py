"""tools/gpu_check.py, as far as it can be tried without a GPU: what it reads, writes and answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.py"
MACHINE = {"gpu": "NVIDIA H200", "commit": "abc123", "torch": "2.13.0"}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_limits_fit_ten_minutes_with_what_lies_between(check):
    assert set(check.LIMITS) == set(check.PARTS) and sum(check.LIMITS.values()) <= 585


def test_a_command_that_ends_and_one_that_does_not(check):
    done = check.run([sys.executable, "-c", "import os; print(os.environ['WORD'])"], 60, WORD="seen")
    assert done["ok"] and done["output"] == "seen\n" and done["status"] == "exit status 0"
    failed = check.run([sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert not failed["ok"] and failed["status"] == "exit status 3"
    # a child that holds on to the output does not hold the check up
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    late = check.run([sys.executable, "-c", child], 1)
    assert not late["ok"] and late["status"] == "killed after 1 s" and late["seconds"] < 30


def test_a_run_of_pytest_is_summed_up(check, tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_absent(): pytest.skip('one GPU is present')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no file')\n"
        "def test_broken(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    check.run([*check.PYTEST, str(tmp_path), "-c", "/dev/null", f"--junit-xml={report}"], 120)
    found = check.junit_summary(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, {"one GPU is present": 1})
    bad, broken = found["failures"].items()
    assert bad[0].endswith("::test_bad") and "not equal" in bad[1] and "no file" in broken[1]
    assert check.junit_summary(tmp_path / "missing.xml") == {}


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("3 passed in 2.0s\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 2),
        ("========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 1 error\n", 1),
    ],
)
def test_the_sanitizers_counts(check, output, errors):
    assert check.sanitizer_summary(output) == {"errors": errors}
    assert check.sanitizer_summary("nothing of the kind") == {}


def test_benchmarks_keep_what_they_recorded(check):
    row = {"name": "test_x[a]", "group": "g", "stats": {"median": 2e-5}, "extra_info": {"ratio": 3.0, "ours_us": 7.0}}
    (found,) = check.benchmark_rows({"benchmarks": [row]})
    assert found == {"name": "test_x[a]", "group": "g", "median_us": pytest.approx(20.0), "ratio": 3.0, "ours_us": 7.0}


def test_parts_of_one_machine_and_commit_are_gathered(check, tmp_path):
    path = tmp_path / "found.json"

    def keep(machine, **parts):
        result = check.gathered(path, machine, parts)
        path.write_text(json.dumps(result))
        return result

    good, bad = {"ok": True, "seconds": 1.0}, {"ok": False, "seconds": 2.0}
    assert keep(MACHINE, tests=bad)["ok"] is False
    both = keep(MACHINE, build=good)
    assert list(both["parts"]) == ["build", "tests"] and both["ok"] is False
    assert keep(MACHINE, tests=good)["ok"] is True
    assert set(both) == {"ok", "date", "machine", "parts"} and both["machine"] == MACHINE
    assert list(keep({**MACHINE, "commit": "def456"}, bench=good)["parts"]) == ["bench"]
    assert check.default_path(MACHINE).name == "nvidia-h200-abc123.json"


def test_all_of_it_with_parts_that_are_stand_ins(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "machine", lambda: MACHINE)
    ran = []

    def part(name, ok):
        return lambda limit: ran.append((name, limit)) or {"ok": ok, "seconds": 0.5}

    monkeypatch.setattr(check, "PARTS", {name: part(name, name != "bench") for name in check.PARTS})
    path = tmp_path / "kept" / "found.json"
    assert check.main(["--parts", "tests,build", "--out", str(path)]) == 0
    assert ran == [("build", check.LIMITS["build"]), ("tests", check.LIMITS["tests"])]
    assert check.main(["--parts", "bench", "--out", str(path), "--limit", "7"]) == 1
    assert ran[-1] == ("bench", 7.0) and "bench: FAILED" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["build", "tests", "bench"] and found["ok"] is False
    with pytest.raises(SystemExit):
        check.main(["--parts", "test"])


def test_there_is_something_to_sanitize(check):
    listed = check.run([*check.PYTEST, "tests/gpu", "-m", "sanitizer", "--collect-only"], 120)
    assert listed["ok"] and "test_gpu_sanitized.py" in listed["output"]


def test_no_sanitizer_is_a_failure(check, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: None)
    result = check.sanitizer(10)
    assert not result["ok"] and "compute-sanitizer is neither on PATH" in result["status"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device is present" in done.stderr and done.stdout == ""
