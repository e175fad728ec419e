"""The benchmarks' own tools: their clocks as far as they can be tried without a GPU, and the page of a saved run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from calguide_fast import guidance_gradient
from calguide_fast.backends import cpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_the_kernel_alone_is_what_the_op_calls():
    from timing import kernel_alone

    logits, labels = torch.randn(3, 7), torch.tensor([0, 1, 2])
    before = cpu._kernels.native
    out = torch.empty_like(logits)
    with kernel_alone(lambda f, y: guidance_gradient(f, y, out=out), (logits, labels)) as kernel:
        expected = out.clone()
        out.zero_()
        kernel()
    assert torch.equal(out, expected) and cpu._kernels.native is before


def test_peak_memory_is_what_is_held_at_once():
    from timing import peak_memory

    x = torch.randn(1000)
    # the first of three intermediates is gone before the third is there
    assert peak_memory(lambda x: x.exp().exp().exp(), (x,), x.device) == 2 * x.nbytes
    assert peak_memory(lambda x: x.exp_(), (x,), x.device) == 0


def test_times_are_of_one_call_and_in_turn():
    from timing import BLOCKS, HostClock, interleaved

    order: list[str] = []
    clock = HostClock()
    times = interleaved(clock, [lambda: order.append("a"), lambda: order.append("b")], [[()], [()]], 0.002)
    assert all(0 < time < 1e-3 for time in times)
    changes = sum(one != other for one, other in zip(order, order[1:]))
    # each one's first calls, then the blocks
    assert changes == 2 * BLOCKS + 1


def test_parts_are_timed_within_the_whole(monkeypatch):
    from timing import shares_within

    now = 0.0

    def takes(seconds):
        def run():
            nonlocal now
            now += seconds

        return run

    monkeypatch.setattr("timing.time", SimpleNamespace(perf_counter=lambda: now))
    owner, rest = SimpleNamespace(long=takes(5.0), short=takes(2.0)), takes(1.0)

    def whole():
        owner.long()
        owner.short()
        owner.short()
        rest()

    functions = dict(vars(owner))
    shares = shares_within(whole, {"long": (owner, "long"), "short": (owner, "short")}, 50.0)
    assert shares == {"long": 0.5, "short": 0.4} and now == 50.0
    assert vars(owner) == functions


def test_a_gpus_inputs_pass_its_cache_in_turn(monkeypatch):
    from timing import DeviceClock

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, end):
            return 6.0

    seen: list = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=4096))
    clock = DeviceClock()
    x = torch.zeros(1024)
    copies = clock.copies((x, None))
    # twice the cache, and one in use, without the original
    assert len(copies) == 4 and len({each[0].data_ptr() for each in copies} | {x.data_ptr()}) == 5
    assert clock.block(lambda x, _: seen.append(x.data_ptr()), copies, 6) == pytest.approx(1e-3)
    pointers = [each[0].data_ptr() for each in copies]
    assert seen == ["event", *pointers, *pointers[:2], "event", "wait"], "nothing waits in between"


def saved_run() -> dict:
    common = {"device": "cpu", "threads": 1, "torch": "2.13.0", "same_result": True, "floor": None, "ceiling": None}
    speed = {"bytes": 2**19, "gb_per_s": 12.5, "copy_gb_per_s": 50.0, "share_of_copy": 0.25, "host_us": 6.25}
    memory = {"peak_bytes": 257_280, "peer_peak_bytes": 1_280_000}
    row = common | speed | memory | {"peer": "eager", "peer_us": 400.0, "ours_us": 40.0, "ratio": 10.0, "floor": 15.0}
    parts = {"model": 700.0, "guidance_gradient": 50.0, "guided_step": 50.0}
    option = {"table": "options", "per_step": 0.5, "difference": 0.01, "changes_work": False, "floor": None}
    groups = {
        "guidance js 64x1000": row,
        "guided_step 2x1x4x4": row,
        "guidance js 8x10": row | {"peer": "torch.softmax", "same_result": False, "floor": None, "peak_bytes": None},
        "sampling digits, EluCD": row | {"table": "sampling", "per_step": 0.5, "floor": None},
        "sampling digits, bf16": row | option,
        "sampling digits, compiled": row | option | {"difference": 0.0, "compile_s": 65.0},
        "sampling digits, parts": {
            "table": "parts", "step_us": 1000.0, "eager_step_us": 1250.0, "parts_us": parts, "share_of_ours": 0.1,
            "share_around": 0.3,
        },
        "threads guided_step": {
            "table": "threads", "bytes": 4_000_000, "us": [300.0, 200.0], "copy_us": [125.0, 100.0],
        },
        "growth guidance": {
            "table": "growth", "sizes": [1, 10], "work": [1, 10], "us": [5.0, 60.0], "exponent": 1.5, "ceiling": 1.2,
        },
    }  # fmt: skip
    return {
        "machine_info": {
            "node": "a-name-of-a-host",
            "cpu": {"brand_raw": "Some CPU @ 2 GHz"},
            "python_version": "3.11.7",
            "device": "CPU",
            "threads": 1,
            "torch": "2.13.0",
            "backends": {"cpu": "C++, AVX2 (v3)"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False, "branch": "a-branch", "project": "a-folder"},
        "datetime": "2026-01-02T03:04:05+00:00",
        "not_measured": ["Liger-Kernel needs a GPU"],
        "benchmarks": [
            {"group": group, "extra_info": info, "stats": {"median": math.pi, "data": [1.0] * 100}}
            for group, info in groups.items()
        ],
    }


def test_the_page_of_a_saved_run(tmp_path):
    from aims import cause_of

    cause = cause_of("guidance js 64x1000", "eager")
    run = tmp_path / "run.json"
    run.write_text(json.dumps(saved_run()))
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(run), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    name = "some-cpu-2-ghz-1-threads"
    page = (tmp_path / "out" / f"{name}.md").read_text()
    for line in (
        "2026-01-02, commit 0123456789ab; 1 thread(s), Python 3.11.7, torch 2.13.0. Backends: cpu (C++, AVX2 (v3)).",
        "- Liger-Kernel needs a GPU",
        "|  | ours | GB/s | copy | host | memory | eager | torch.softmax |",
        "| `guidance js 64x1000` | 40 | 12.5 | 25% | 6.25 | 257 kB | 400 (10×), 1.28 MB | – |",
        "| `guidance js 8x10` | 40 | 12.5 | 25% | 6.25 | – | – | *400 (10×), 1.28 MB* |",
        "0 of 2 ratios that were aimed at were reached.",
        "| `guidance js 64x1000` | eager | 10× | ≥ 15× | *512 bits in two* |",
        "| `guided_step 2x1x4x4` | eager | 10× | ≥ 15× | – |",
        f"- *512 bits in two*: {cause.text}",
        "| `guided_step` | 300 | 200 | 1.50× | 1.25× | 20 | 40 |",
        "| digits, EluCD | 0.2 | 0.02 | 10.00× |",
        "| digits, bf16 | 0.2 | 0.02 | 10.00× | 0.01 | – |",
        "| digits, compiled | 0.2 | 0.02 | 10.00× | 0 | 65 |",
        "| digits | 0.7 | 0.05 | 0.05 | 0.2 | 1 | 1.25 | 10.0% | 30.0% |",
        "| guidance | 1 … 10 | 5 … 60 | 1.50 (too steep) |",
    ):
        assert line in page.splitlines(), line
    for chart in ("ratios", "roofline", "parts", "growth"):
        picture = tmp_path / "out" / f"{name}-{chart}.png"
        assert f"({picture.name})" in page and picture.read_bytes().startswith(b"\x89PNG")
    kept = (tmp_path / "out" / f"{name}.json").read_text()
    assert not any(word in kept for word in ("a-name-of-a-host", "a-branch", "a-folder", "data", "stats"))
    # what is kept can be reported again
    again = [*command[:2], str(tmp_path / "out" / f"{name}.json"), "--out", str(tmp_path / "again")]
    subprocess.run(again, check=True, capture_output=True)
    assert (tmp_path / "again" / f"{name}.md").read_text() == page


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_kept_runs_say_why_they_fall_short(path):
    from aims import cause_of
    from report import is_missed

    rows = [row for row in json.loads(path.read_text())["rows"] if "ratio" in row]
    missed = [(row["group"], row["peer"]) for row in rows if is_missed(row)]
    assert [row for row in missed if cause_of(*row) is None] == []


def test_the_readme_shows_a_kept_run():
    from summary import README, placed, summary

    text = README.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- benchmarks: (\S+) -->", text)
    assert shown
    for name in shown:
        kept = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert placed(text, name, summary(kept)) == text, f"python benchmarks/summary.py benchmarks/results/{name}.json"


def test_a_summary_has_what_the_run_has():
    from report import condensed
    from summary import placed, summary

    run = condensed(saved_run())
    run["rows"][0]["peer"] = "eager closed form"
    lines = summary(run)
    for line in (
        "| `guidance js 64x1000` | 40 | 400 (10×) |",
        "| digits, EluCD | 0.2 | 0.02 | 10.00× | – |",
        "Of 2 ratios that were aimed at, 0 were reached.",
    ):
        assert line in lines, line
    assert not any("guidance js 8x10" in line or "guided_step" in line for line in lines), "rows that are not shown"
    text = "before\n<!-- benchmarks: a -->\nold\n<!-- end of benchmarks -->\nafter\n"
    once = placed(text, "a", ["new"])
    assert once == "before\n<!-- benchmarks: a -->\n\nnew\n\n<!-- end of benchmarks -->\nafter\n"
    assert placed(once, "a", ["new"]) == once
    with pytest.raises(ValueError, match="no place for the run: lines '<!-- benchmarks: b -->'"):
        placed(text, "b", [])


@pytest.mark.parametrize(
    ("group", "peer", "floor"),
    [
        ("guidance js 8x10", "eager autograd", 50),
        ("guidance js 64x1000", "eager closed form", 12),
        ("guidance js 64x1000", "torch.softmax", None),
        ("guidance reverse_kl 64x1000", "torch.softmax", 1),
        ("guidance reverse_kl 16x1000", "torch.softmax", None),
        ("guidance reverse_kl 256x1000 bf16", "torch.compile", None),
        ("guided_step 16x3x128x128, noise drawn, out=", "torch.compile", None),
        ("sampling digits", "eager loop", None),
    ],
)
def test_aims_are_of_whole_groups(group, peer, floor):
    from aims import floor_of

    assert floor_of(group, peer) == floor
