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


@pytest.mark.parametrize("call", ["right", "fast", "whole"])
def test_each_call_fits_ten_minutes_with_what_lies_between(call, check, capsys):
    assert set(check.LIMITS) == set(check.PARTS) and set(check.CALLS) == {"right", "fast", "whole"}
    # every call may find a machine that knows of no other
    assert check.CALLS[call][0] == "build" and set(check.CALLS[call]) <= set(check.PARTS)
    assert sum(check.LIMITS[part] + check.GRACE for part in check.CALLS[call]) <= 580
    assert check.main(["--plan"]) == 0
    assert f"--call {call}: at most" in capsys.readouterr().out


def test_the_calls_together_leave_time_to_begin_in_half_an_hour(check):
    assert sum(check.LIMITS[part] + check.GRACE for parts in check.CALLS.values() for part in parts) <= 1600
    # all but the whole of the benchmarks, which takes as long as all else
    assert {part for parts in check.CALLS.values() for part in parts} == set(check.PARTS) - {"bench"}


def test_a_command_that_ends_and_one_that_does_not(check, interruptible, monkeypatch, tmp_path):
    log = tmp_path / "log"
    done = check.run([sys.executable, "-c", "import os; print(os.environ['WORD'])"], 60, log, WORD="seen")
    assert done["ok"] and done["output"] == log.read_text() == "seen\n" and done["status"] == "exit status 0"
    failed = check.run([sys.executable, "-c", "raise SystemExit(3)"], 60, log)
    assert not failed["ok"] and failed["status"] == "exit status 3"
    # a child that holds on to the output does not hold the check up
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    late = check.run([sys.executable, "-c", child], 1, log)
    assert not late["ok"] and late["status"] == "interrupted after 1 s" and late["seconds"] < 30
    monkeypatch.setattr(check, "GRACE", 1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    late = check.run([sys.executable, "-c", deaf], 2, log)
    assert not late["ok"] and late["status"] == "killed after 2 s" and late["seconds"] < 30 and late["output"] == "on\n"


def test_a_run_of_pytest_that_is_cut_short_says_what_it_found(check, interruptible, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(600)\n"
    )
    report = tmp_path / "report.xml"
    late = check.run([*check.PYTEST, str(tmp_path), "-c", "/dev/null", f"--junit-xml={report}"], 6, tmp_path / "log")
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
    check.run([*check.PYTEST, str(tmp_path), "-c", "/dev/null", f"--junit-xml={report}"], 120, tmp_path / "log")
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


def test_tests_run_side_by_side_where_that_is_possible(check, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert check.side_by_side() == []
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)
    assert check.side_by_side() == ["-n", "8"]


def test_all_of_it_with_parts_that_are_stand_ins(check, tmp_path, monkeypatch, capsys, interruptible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "machine", lambda: MACHINE)
    ran = []

    def part(name, ok):
        return lambda limit, logs: ran.append((name, limit)) or {"ok": ok, "seconds": 0.5}

    monkeypatch.setattr(check, "PARTS", {name: part(name, name != "bench") for name in check.PARTS})
    path, logs = tmp_path / "kept" / "found.json", f"--logs={tmp_path / 'logs'}"
    assert check.main(["--parts", "tests,build", "--out", str(path), logs]) == 0
    assert ran == [("build", check.LIMITS["build"]), ("tests", check.LIMITS["tests"])]
    assert "may last" not in capsys.readouterr().out
    assert check.main(["--out", str(tmp_path / "whole.json"), logs, "--limit", "200"]) == 0
    assert [name for name, _ in ran[2:]] == ["build", "tests", "triton", "sanitizer"], "the benchmarks are asked for"
    assert "this may last 800 s; where a call may last 600, see --plan" in capsys.readouterr().out
    ran.clear()
    assert check.main(["--call", "whole", "--out", str(tmp_path / "call.json"), logs]) == 0
    assert [name for name, _ in ran] == ["build", "end_to_end", "tune"] and (tmp_path / "logs").is_dir()
    assert check.main(["--parts", "bench", "--out", str(path), logs, "--limit", "7"]) == 1
    assert ran[-1] == ("bench", 7.0) and "bench: FAILED" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["build", "tests", "bench"] and found["ok"] is False
    with pytest.raises(SystemExit):
        check.main(["--parts", "test"])


def test_there_is_something_to_sanitize(check, tmp_path):
    command = [*check.PYTEST, "tests/gpu", "-m", "sanitizer", "--collect-only"]
    listed = check.run(command, 120, tmp_path / "log")
    assert listed["ok"] and "test_gpu_sanitized.py" in listed["output"]
    # it is ten to a hundred times slower than a test alone
    assert 0 < listed["output"].count("test_gpu_sanitized.py::") <= 30


def test_all_sanitizers_run_and_one_that_finds_something_fails(check, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    count = "$([ $2 = racecheck ] && echo 3 || echo 0)"
    tool.write_text(
        f'#!/bin/sh\necho "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "===== ERROR SUMMARY: {count} errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: str(tool))
    result = check.sanitizer(30, tmp_path)
    assert not result["ok"] and {name: tool["errors"] for name, tool in result["tools"].items()} == {
        "memcheck": 0, "racecheck": 3, "initcheck": 0, "synccheck": 0,
    }  # fmt: skip
    assert [tool["ok"] for tool in result["tools"].values()] == [True, False, True, True]
    assert all(f"{name} 1\n" in (tmp_path / "sanitizer.log").read_text() for name in check.SANITIZERS)


@pytest.mark.parametrize(("part", "tool"), [("sanitizer", "compute-sanitizer"), ("resources", "cuobjdump")])
def test_a_tool_that_is_missing_is_a_failure(part, tool, check, monkeypatch, tmp_path):
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: None)
    result = check.PARTS[part](10, tmp_path)
    assert not result["ok"] and f"{tool} is neither on PATH" in result["status"]


def test_what_is_built_from_the_same_sources_is_not_built_again(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "calguide_fast").mkdir()
    for name in ("setup.py", "csrc/a.cu"):
        (tmp_path / name).write_text("1")
    ran = []

    def builds(command, limit, log, **environment):
        ran.append(environment["CALGUIDE_CUDA_ARCHS"])
        for module in check.native_modules():
            module.write_text("")
        return {"ok": True, "seconds": 1.0}

    monkeypatch.setattr(check, "run", builds)
    for _ in range(2):
        assert check.build(10, tmp_path)["ok"]
    assert ran == ["90"]
    (tmp_path / "csrc" / "a.cu").write_text("2")
    check.build(10, tmp_path)
    check.native_modules()[1].unlink()
    check.build(10, tmp_path)
    assert len(ran) == 3


def test_a_scripts_results_are_kept_and_it_finds_the_package_that_was_built_here(check, tmp_path):
    file = tmp_path / "measure.py"
    file.write_text(
        "import json, sys, calguide_fast\n"
        "out, seconds = sys.argv[2], float(sys.argv[4])\n"
        "open(out, 'w').write(json.dumps([calguide_fast.__file__, seconds]))\n"
    )
    result = check.script("measure", str(file), 50.4, 60, tmp_path)
    assert result["ok"] and result["results"] == [str(ROOT / "calguide_fast" / "__init__.py"), 50.0]
    file.write_text("raise SystemExit(2)")
    result = check.script("measure", str(file), 1, 60, tmp_path)
    assert not result["ok"] and "results" not in result, "an earlier call's results are not this one's"


def test_what_kernels_take_is_read(check):
    text = " Function _Z1k:\n  REG:60 STACK:8 SHARED:1372 LOCAL:0 CONSTANT[0]:904\n"
    text += " Function _Z1f:\n  REG:32 STACK:0 SHARED:0 LOCAL:4 TEXTURE:0\n"
    assert check.kernel_resources(text) == [
        {"kernel": "_Z1k", "registers": 60, "stack": 8, "shared": 1372, "local": 0},
        {"kernel": "_Z1f", "registers": 32, "stack": 0, "shared": 0, "local": 4},
    ]


def test_a_target_is_seen_beside_what_was_foreseen(check):
    row = {"group": "guidance js (cuda)", "ours_us": 10.0, "ratio": 2.0, "peer": "eager", "share_of_copy": 0.4}
    assert check.target_line(row) == "guidance js (cuda): 10 us, 40% of a copy; eager 2.00 x"
    row |= {"graph_ours_us": 5.0, "graph_ratio": 3.0, "predicted_us": 4.0, "aim_us": 5.0}
    line = check.target_line(row)
    assert line == "guidance js (cuda): 5 us (foreseen 4), 80% of a copy, aim 5 us; eager 3.00 x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device is present" in done.stderr and done.stdout == ""
