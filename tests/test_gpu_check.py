"""tools/gpu_check.py, as far as it can be tried without a GPU: what it reads, writes and answers."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.py"
MACHINE = {"gpu": "NVIDIA H200", "commit": "abc123", "changes": None, "torch": "2.13.0"}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def interruptible():
    """Whatever is started, be this run in a shell's background or not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("parts", [("build", "tests"), ("triton", "sanitizer")])
def test_limits_fit_two_calls_of_ten_minutes_with_what_lies_between(parts, check):
    assert set(check.LIMITS) == set(check.PARTS) and set(parts) <= set(check.DEFAULT)
    assert sum(check.LIMITS[part] + check.GRACE for part in parts) <= 585


def test_a_command_that_ends_and_one_that_does_not(check, interruptible, monkeypatch):
    done = check.run([sys.executable, "-c", "import os; print(os.environ['WORD'])"], 60, WORD="seen")
    assert done["ok"] and done["output"] == "seen\n" and done["status"] == "exit status 0"
    failed = check.run([sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert not failed["ok"] and failed["status"] == "exit status 3"
    # a child that holds on to the output does not hold the check up
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    late = check.run([sys.executable, "-c", child], 1)
    assert not late["ok"] and late["status"] == "interrupted after 1 s" and late["seconds"] < 30
    monkeypatch.setattr(check, "GRACE", 1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    late = check.run([sys.executable, "-c", deaf], 2)
    assert not late["ok"] and late["status"] == "killed after 2 s" and late["seconds"] < 30 and late["output"] == "on\n"


def test_a_run_of_pytest_that_is_cut_short_says_what_it_found(check, interruptible, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(600)\n"
    )
    report = tmp_path / "report.xml"
    late = check.run([*check.PYTEST, str(tmp_path), "-c", "/dev/null", f"--junit-xml={report}"], 6)
    found = check.junit_summary(report)
    assert not late["ok"] and late["status"] == "interrupted after 6 s" and "KeyboardInterrupt" in late["output"]
    assert found["passed"] == 1 and found["failed"] == 1
    report.write_text(report.read_text()[:-20])
    assert check.junit_summary(report) == {}


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


def test_parts_are_gathered_only_of_a_known_state(check, tmp_path):
    path = tmp_path / "found.json"
    for machine in ({**MACHINE, "commit": None}, {**MACHINE, "changes": "0123"}, MACHINE):
        for part in ("build", "tests"):
            check.write(path, check.gathered(path, machine, {part: {"ok": True}}))
        assert list(json.loads(path.read_text())["parts"]) == (["build", "tests"] if machine["commit"] else ["tests"])
    assert list(tmp_path.iterdir()) == [path]
    assert check.default_path({**MACHINE, "changes": "0123"}).name == "nvidia-h200-abc123-0123.json"
    assert check.default_path({**MACHINE, "commit": None}).name == "nvidia-h200-unknown.json"


@pytest.mark.parametrize("content", ["", '{"ok": true, "par', "[1, 2]", "{}"])
def test_a_damaged_file_is_written_anew(content, check, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(content)
    check.write(path, check.gathered(path, MACHINE, {"build": {"ok": True}}))
    assert list(json.loads(path.read_text())["parts"]) == ["build"]


def test_what_differs_from_the_commit_has_a_name(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    (tmp_path / "setup.py").write_text("pass\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    names = [check.changes()]
    (tmp_path / "notes.txt").write_text("not of the code")
    names.append(check.changes())
    assert names == [None, None]
    for file, text in (("setup.py", "1\n"), ("setup.py", "2\n"), ("csrc/a.cu", "1\n"), ("csrc/a.cu", "2\n")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
        names.append(check.changes())
    assert len(set(names)) == 5 and all(len(name) == 12 for name in names[2:])


def test_triton_is_compiled_side_by_side_where_that_is_possible(check, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert check.side_by_side() == []
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)
    assert check.side_by_side() == ["-n", "8"]


def test_all_of_it_with_parts_that_are_stand_ins(check, tmp_path, monkeypatch, capsys, interruptible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "machine", lambda: MACHINE)
    ran = []

    def part(name, ok):
        return lambda limit: ran.append((name, limit)) or {"ok": ok, "seconds": 0.5}

    monkeypatch.setattr(check, "PARTS", {name: part(name, name != "bench") for name in check.PARTS})
    path = tmp_path / "kept" / "found.json"
    assert check.main(["--parts", "tests,build", "--out", str(path)]) == 0
    assert ran == [("build", check.LIMITS["build"]), ("tests", check.LIMITS["tests"])]
    assert "may last" not in capsys.readouterr().out
    assert check.main(["--out", str(tmp_path / "whole.json")]) == 0
    assert [name for name, _ in ran[2:]] == ["build", "tests", "triton", "sanitizer"], "the benchmarks are asked for"
    assert "this may last 950 s; where a call may last 600, run --parts build,tests and" in capsys.readouterr().out
    assert check.main(["--parts", "bench", "--out", str(path), "--limit", "7"]) == 1
    assert ran[-1] == ("bench", 7.0) and "bench: FAILED" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["build", "tests", "bench"] and found["ok"] is False
    with pytest.raises(SystemExit):
        check.main(["--parts", "test"])


def test_there_is_something_to_sanitize(check):
    listed = check.run([*check.PYTEST, "tests/gpu", "-m", "sanitizer", "--collect-only"], 120)
    assert listed["ok"] and "test_gpu_sanitized.py" in listed["output"]
    # it is ten to a hundred times slower than a test alone
    assert 0 < listed["output"].count("test_gpu_sanitized.py::") <= 30


def test_tools_that_no_time_is_left_for_say_so(check, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: "/bin/true")
    result = check.sanitizer(0)
    assert not result["ok"]
    assert {tool["status"] for tool in result["tools"].values()} == {"not started: no time was left"}


def test_no_sanitizer_is_a_failure(check, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: None)
    result = check.sanitizer(10)
    assert not result["ok"] and "compute-sanitizer is neither on PATH" in result["status"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device is present" in done.stderr and done.stdout == ""
