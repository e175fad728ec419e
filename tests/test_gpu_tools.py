"""The scripts that a GPU is measured with, as far as they can be tried without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import calguide_fast
from calguide_fast import FDivSampler
from calguide_fast.models import UNet, resnet18

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("tools", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)


@pytest.fixture
def tune():
    return importlib.import_module("gpu_tune")


@pytest.fixture
def counters():
    return importlib.import_module("gpu_counters")


def test_every_choice_of_the_cuda_kernels_is_one_and_has_todays_value(tune):
    header = (ROOT / "csrc" / "cuda" / "tuning.h").read_text()
    today = dict(re.findall(r"#define CALGUIDE_(\w+) (\w+)", header))
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*") if path.name != "tuning.h")
    assert all(sources.count(f"CALGUIDE_{name}") for name in today), "a choice that no kernel makes"
    for group in (group for group in tune.GROUPS if group.backend == "cuda"):
        assert (ROOT / "csrc" / "cuda" / f"{group.place}.cu").exists()
        for candidate in group.candidates:
            assert candidate.keys() <= today.keys()
            assert any(str(value) != today[name] for name, value in candidate.items()), "that is today's"


def test_every_choice_of_tritons_kernels_is_one_and_differs_from_todays(tune):
    pytest.importorskip("triton", reason="Triton's kernels need Triton, which is not installed")
    for group in (group for group in tune.GROUPS if group.backend == "triton"):
        module = importlib.import_module(f"calguide_fast.backends.triton.{group.place}")
        for candidate in group.candidates:
            today = {name: getattr(module, name) for name in candidate}
            assert today != candidate
            with tune.constants(module, candidate):
                assert {name: getattr(module, name) for name in candidate} == candidate
            assert {name: getattr(module, name) for name in candidate} == today


def test_every_group_is_timed_at_targets_that_there_are(tune):
    targets = importlib.import_module("gpu_targets")
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)
    assert {name for group in tune.GROUPS for name in group.targets} <= set(names)


GROUP = {"name": "g", "backend": "cuda", "place": "step", "targets": ("a", "b"), "candidates": ({"X": 1}, {"X": 2})}


def found(**times) -> dict:
    """Target to µs of today's, of X = 1, of X = 2, and of today's again."""
    names = ["today", "X = 1", "X = 2", "today"]
    rows = {}
    for target, microseconds in times.items():
        each = zip(names, microseconds, strict=True)
        rows[target] = [
            {"candidate": name, "reason": us} if isinstance(us, str) else {"candidate": name, "us": us, "share": 0.5}
            for name, us in each
        ]
    return rows


@pytest.mark.parametrize(
    ("times", "advice"),
    [
        ({"a": (10, 8, 9, 10), "b": (10, 8, 9, 10)}, "In csrc/cuda/tuning.h, set X = 1: +25.0% on average, +25.0% at"),
        # the better one is refused, so the next is taken
        ({"a": (10, "OutOfMemory", 9, 10), "b": (10, 8, 9, 10)}, "In csrc/cuda/tuning.h, set X = 2: +11.1% on average"),
        ({"a": (10, 5, 10, 10), "b": (10, 12, 10, 10)}, "X = 1 gains +29.1%, but -16.7% at one size: choose by size."),
        ({"a": (10, 9.9, 10, 10), "b": (10, 10, 11, 10)}, "Keep today's: nothing gains more than 2.0%."),
        # today's differs from itself by more than what would be gained
        ({"a": (10, 9.9, 10, 12), "b": (10, 9.9, 10, 12)}, "Keep today's: nothing gains more than 20.2%."),
    ],
)
def test_what_is_advised(times, advice, tune, tmp_path):
    group = tune.Group(**GROUP)
    entry = tune.judged(group, found(**times))
    assert entry["advice"].startswith(advice)
    gains = [each.get("gain", -math.inf) for each in entry["ranked"]]
    assert gains == sorted(gains, reverse=True)
    results = {"device": "A GPU", "torch": "2.11", "groups": [entry], "left_out": ["another"]}
    tune.write(tmp_path / "tune.json", results)
    page = (tmp_path / "tune.md").read_text()
    assert entry["advice"] in page and "another: not measured" in page
    assert json.loads((tmp_path / "tune.json").read_text())["groups"][0]["noise"] == entry["noise"]
    for row in entry["ranked"]:
        assert f"| {row['candidate']} | " in page
    assert {path.name for path in tmp_path.iterdir()} == {"tune.json", "tune.md"}


def test_results_are_the_same_only_to_rounding(tune):
    x = torch.linspace(0, 1, 5)
    assert tune.same((x, x), (x + 1e-7, x)) and not tune.same((x, x), (x, x + 1e-3))
    assert not tune.same(x * math.nan, x) and not tune.same(x, x * math.nan)


def test_a_candidate_is_made_once(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "BUILD", tmp_path)
    command = [sys.executable, "-c", "import sys; open(sys.argv[2], 'w').write('made')"]
    first = tune.made(command, ".o", b"sources")
    assert first.read_text() == "made"
    first.write_text("kept")
    assert tune.made(command, ".o", b"sources") == first and first.read_text() == "kept"
    assert tune.made(command, ".o", b"other sources") != first
    with pytest.raises(RuntimeError, match="SystemExit|failed"):
        tune.made([sys.executable, "-c", "raise SystemExit(1)"], ".o", b"")


def test_candidates_are_timed_beside_todays_or_refused(tune, monkeypatch):
    group = tune.Group(**{**GROUP, "candidates": ({"X": 1}, {"X": 2}, {"X": 3})})
    target = importlib.import_module("gpu_targets").guidance_target("js", (7, 10), (1, 1))

    def wrong(*inputs):
        return tuple(part + 1 for part in target.call(*inputs))

    def broken(*inputs):
        raise RuntimeError("CUDA could not reserve shared memory\nat all")

    calls = [target.call, wrong, broken, target.call, target.call]
    monkeypatch.setattr(tune, "calls_of", lambda *_: calls)
    monkeypatch.setattr(tune, "SECONDS", 0.002)
    # a CPU replays no graphs
    monkeypatch.setattr(tune, "SMALL", 0)
    rows = tune.timed(group, target, {}, CPU)
    assert [row["candidate"] for row in rows] == ["today", "X = 1", "X = 2", "X = 3", "today"]
    assert rows[1]["reason"] == "another result than today's"
    assert rows[2]["reason"] == "RuntimeError: CUDA could not reserve shared memory"
    assert all(row["us"] > 0 for row in (rows[0], rows[3], rows[4]))
    assert "gain" not in tune.judged(group, {target.name: rows})["ranked"][-1]
    calls[:] = [broken] * 5
    assert all("us" not in row for row in tune.timed(group, target, {}, CPU))


def test_groups_for_which_no_time_is_left_are_named(tune, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune, "modules", lambda groups: {})
    monkeypatch.setenv("CALGUIDE_CUDA_ARCHS", "90")
    monkeypatch.setenv("CALGUIDE_FORCE_CUDA", "1")
    rows = [{"candidate": "", "us": 3.0, "share": None}]
    monkeypatch.setattr(tune, "timed", lambda group, *_: rows * len(tune.in_group(group)))
    out = tmp_path / "tune.json"
    assert tune.main(["--out", str(out)]) == 0
    assert [entry["group"] for entry in json.loads(out.read_text())["groups"]] == [group.name for group in tune.GROUPS]
    times = iter([0.0, 1.0, 2.0, 2.0, 300.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(times))
    assert tune.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text())["left_out"] == [group.name for group in tune.GROUPS[1:]]
    assert "Keep today's" in capsys.readouterr().out


def test_a_candidates_kernels_take_the_place_of_todays(tune, monkeypatch):
    group = tune.Group(**{**GROUP, "backend": "triton", "place": "step"})
    module = SimpleNamespace(X=0)
    monkeypatch.setattr(calguide_fast, "use_backend", lambda name: tune.constants(module, {}))
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: module)
    calls = tune.calls_of(group, lambda: module.X, {})
    assert [call() for call in calls] == [0, 1, 2, 0] and module.X == 0


def test_modules_of_one_name_are_loaded_side_by_side(tune, tmp_path):
    built = importlib.util.find_spec("calguide_fast._cuda")
    if built is None:
        pytest.skip("the CUDA module is not built, as there is no nvcc")
    paths = [shutil.copy(built.origin, tmp_path / f"{name}.so") for name in ("one", "other")]
    one, other = (tune.loaded(Path(path)) for path in paths)
    assert one is not other and one.guidance_gradient is not other.guidance_gradient
    assert one.runtime_version() == other.runtime_version() > 0


RAW = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","","nsecond","byte","register/thread"
"0","7","spin_kernel(long)","1,000","0","16"
"1","7","void guide_warp_rows<float>(Task)","3,500.5","1,024,000","105"
"2","7","spin_kernel(long)","1,000","0","16"
"3","7","prepare_kernel","900","n/a","28"
"4","7","search_kernel","42,000","10","125"
==PROF== Disconnected from process 7
"""


def test_what_the_profiler_counted_belongs_to_the_target_after_its_mark(counters):
    rows = counters.kernels_in(RAW, ["guidance", "smooth_ece"])
    assert [(row["target"], row["us"], row["registers"]) for row in rows] == [
        ("guidance", 3.5005, 105.0), ("smooth_ece", 0.9, 28.0), ("smooth_ece", 42.0, 125.0),
    ]  # fmt: skip
    assert rows[0]["dram_read"] == 1_024_000 and rows[1]["dram_read"] is None and rows[0]["issue_percent"] is None
    assert counters.kernels_in("==ERROR== no permission", ["guidance"]) == []


def test_the_profiler_looks_at_all_of_our_kernels(counters):
    names = re.compile(counters.KERNELS)
    sources = [*(ROOT / "csrc" / "cuda").glob("*"), *(ROOT / "calguide_fast" / "backends" / "triton").glob("*.py")]
    kernel = re.compile(r"(?:__launch_bounds__\(.*\)\s+|def )_?(\w+_kernel|guide_\w+_rows)\(")
    found = {name for path in sources for name in kernel.findall(path.read_text())}
    # of ops that are no target: noise and x0 by themselves, weights, labels, and gradients of the smooth ECE
    others = {"normal", "x0", "predict", "tilt", "weigh", "curve", "gradient", "label", "pull"}
    assert {name for name in found if not names.search(name)} == {f"{other}_kernel" for other in others}
    assert counters.MARK in counters.KERNELS
    assert len(counters.order(["cuda", "triton"])) == 2 * len(importlib.import_module("gpu_targets").TARGETS)


def test_no_profiler_is_said(counters, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(counters, "ncu", lambda: None)
    assert counters.main(["--out", str(tmp_path / "counters.json")]) == 2
    assert "ncu (Nsight Compute) is neither on PATH" in capsys.readouterr().err


def test_a_profiler_that_reads_nothing_is_a_failure_that_says_why(counters, monkeypatch, capsys, tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\necho '==ERROR== LibraryNotLoaded'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(counters, "ncu", lambda: str(tool))
    assert counters.main(["--out", str(tmp_path / "counters.json")]) == 1
    assert "LibraryNotLoaded" in capsys.readouterr().err
    assert "LibraryNotLoaded" in (tmp_path / "counters.csv").read_text()
    assert json.loads((tmp_path / "counters.json").read_text())["status"] == "exit status 1"


def test_targets_are_the_ops_and_their_peers_agree():
    targets, rows = importlib.import_module("gpu_targets"), importlib.import_module("test_gpu_targets")
    small = [
        targets.guidance_target("js", (7, 10), (1, 1)),
        targets.guidance_target("reverse_kl", (7, 10), (1, 1)),
        targets.step_target((2, 3, 4, 4), (1, 1)),
        targets.smooth_ece_target(1000, (1, 1)),
    ]
    for target in small:
        inputs = target.inputs(CPU)
        assert target.elements == inputs[0].numel() and target.op in rows.PEERS
        found, wanted = rows.comparable(target, target.call(*inputs)), rows.expected(target, CPU)
        for one, other in zip(*((each,) if isinstance(each, torch.Tensor) else each for each in (found, wanted))):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
        for peer in rows.PEERS[target.op]:
            if "compile" in peer or peer == rows.LIGER:
                continue
            result = rows.peers_call(target, peer)(*inputs)
            if target.op == "guidance":
                torch.testing.assert_close(result[0].double(), wanted[0], rtol=1e-4, atol=1e-4)
            else:
                assert result.isfinite().all()


@pytest.fixture
def small(monkeypatch):
    """The whole comparison, of networks that a CPU runs in no time."""
    whole = importlib.import_module("end_to_end")

    def unet(preset: str) -> UNet:
        return UNet(
            image_size=8, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1,
            attention_resolutions=(), channel_mult=(1,), num_classes=1000, use_scale_shift_norm=True,
        )  # fmt: skip

    monkeypatch.setattr(whole, "adm_unet", unet)
    monkeypatch.setattr(whole, "resnet101", resnet18)
    monkeypatch.setattr(whole, "ABOUT", 0.01)
    monkeypatch.setattr(whole, "FEWEST", 2)
    option = whole.Way("channels_last", {"channels_last": True})
    monkeypatch.setattr(whole, "WAYS", [*whole.WAYS[:2], option, whole.WAYS[-1]])
    return whole


def test_whole_sampling_gives_equal_images_and_says_what_was_left_out(small, tmp_path, capsys):
    out = tmp_path / "whole.json"
    assert small.main(["--out", str(out), "--device", "cpu", "--batches", "2", "--seconds", "60"]) == 0
    results = json.loads(out.read_text())
    equal = results["equal_output"]
    assert equal["most"] < 1e-4 < 1e-3 < equal["guided_by"]
    rows = {row["way"]: row for row in results["rows"]}
    assert rows[small.EAGER]["images_per_s"] and rows["channels_last"]["times_eager"]
    assert rows[small.EQUAL]["extrapolated"].startswith("250 steps from ")
    # compiling is not begun where a minute is not left
    assert rows[small.WAYS[-1].name]["reason"] == "not measured: no time was left"
    assert "GPU h for 50k" in capsys.readouterr().out and set(results["parts_ms"]) == {"2"}
    page = (tmp_path / "whole.md").read_text()
    assert all(f"| 2 | {way} | " in page for way in rows) and "- batch 2: unet" in page
    # as a GPU's rows are
    rows[small.EQUAL] |= {"kernels_per_step": 1200.0, "busy_ms_per_step": rows[small.EQUAL]["step_ms"] / 2}
    assert "| 1200 |  |  | 50% |" in small.page(results)


def test_steps_that_are_not_timed_are_added(small, monkeypatch):
    def takes(run, steps, device):
        return 0.5 + 0.1 * steps

    monkeypatch.setattr(small, "seconds_of", takes)
    monkeypatch.setattr(small, "ABOUT", 1.5)
    found = small.measured(None, 8, CPU)
    assert found["step_ms"] == pytest.approx(100) and found["around_ms"] == pytest.approx(500)
    assert found["images_per_s"] == pytest.approx(8 / 25.5)
    assert found["gpu_hours_50k"] == pytest.approx(50_000 * 25.5 / 8 / 3600)


def test_what_compiles_comes_last(small):
    ways = [way.compiles for _, way in small.order([64, 1])]
    assert ways == sorted(ways) and len(ways) == 2 * len(small.WAYS)
    assert not replace(small.WAYS[-1], options={}).compiles
    assert FDivSampler.__init__.__kwdefaults__.keys() >= {key for way in small.WAYS for key in way.options or {}}
