"""``calguide-fast sweep`` on the demo's digits: its grid, its figures, and going on after a kill."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed

from calguide_fast.cli import main
from calguide_fast.demo import checkpoints
from calguide_fast.demo.experiment import Lab
from calguide_fast.evaluation import frechet_distance, precision_recall
from calguide_fast.generation import commands
from calguide_fast.generation.interrupts import Interrupts
from calguide_fast.generation.shards import Shards
from calguide_fast.generation.team import Team
from calguide_fast.studies import sweep
from calguide_fast.studies.grid import grid_points
from calguide_fast.studies.series import run_series

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

OPTIONS = ["sweep", "--preset", "digits", "--num-samples", "12", "--batch-size", "8", "--steps", "2"]
GRID = ["--divergence", "none,js", "--scale", "0.2,1.5"]
POINTS = 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    assert main([*OPTIONS, *GRID, "--out", str(out)]) == 0
    return out


def results(out) -> list[dict]:
    return json.loads((out / "results.json").read_text())["points"]


@pytest.fixture
def sampled(monkeypatch):
    """The folders that are sampled from now on."""
    folders, sample_missing = [], commands.sample_missing

    def spy(sampler, plan, shards, missing, *rest):
        folders.append((shards.folder.parent.name, list(missing)))
        sample_missing(sampler, plan, shards, missing, *rest)

    monkeypatch.setattr(commands, "sample_missing", spy)
    return folders


@pytest.fixture
def no_pictures(monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.setattr("calguide_fast.studies.frontier.frontier_plot", lambda rows, heading, file: None)


def grid(*options: str) -> list[tuple]:
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    sweep.add_options(parser)
    points = grid_points(parser.parse_args([*OPTIONS[1:], "--out", "x", *options]))
    assert len({point.name for point in points}) == len(points)
    return [tuple(point.columns.values()) for point in points]


def test_the_grid():
    found = grid("--divergence", "js,none,alpha:2", "--alpha", "1,2", "--epsilon", "0.5,0.9", "--scale", "0.1,3")
    around = [(alpha, epsilon, scale) for alpha in (1.0, 2.0) for epsilon in (0.5, 0.9) for scale in (0.1, 3.0)]
    assert found == [
        *(("js", *rest) for rest in around),
        # without a divergence there is no alpha and no epsilon
        *(("none", None, None, scale) for scale in (0.1, 3.0)),
        *(("alpha:2", *rest) for rest in around),
    ]


def test_the_grid_unless_told_otherwise():
    found = grid()
    assert [row[3] for row in found[:5]] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])
    assert {row[:3] for row in found} == {
        ("none", None, None),
        *((name, 1.0, 0.9) for name in ("reverse_kl", "forward_kl", "js")),
    }


def test_the_grid_of_elucds_rule_for_edm():
    found = grid("--recipe", "elucd-edm", "--method", "heun", "--divergence", "none")
    assert [row[3] for row in found] == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.016])
    asked = grid("--rule", "edm", "--method", "heun", "--divergence", "none,js", "--max-guidance", "0.1,0.2")
    assert asked == [(name, *rest, m) for name, *rest in (("none", None, None), ("js", 1.0, 0.9)) for m in (0.1, 0.2)]
    assert [row[3] for row in grid("--recipe", "elucd-edm", "--rule", "score", "--divergence", "js")][2] == 1.0


def test_a_sweep_of_elucds_rule_for_edm(tmp_path):
    options = ["--rule", "edm", "--method", "heun", "--divergence", "none", "--max-guidance", "0.1,0.2"]
    assert main([*OPTIONS, *options, "--out", str(tmp_path)]) == 0
    assert [row["max_guidance"] for row in results(tmp_path)] == [0.1, 0.2]
    assert len({row["fid"] for row in results(tmp_path)}) == 2
    assert [path.name[:10] for path in sorted(tmp_path.glob("points/*"))] == ["none-m0.1-", "none-m0.2-"]


def test_compute_is_matched_and_points_differ(swept):
    settings = [json.loads((swept / row["folder"] / "config.json").read_text())["settings"] for row in results(swept)]
    guidance = [found.pop("guidance") for found in settings]
    assert all(found == settings[0] for found in settings) and settings[0]["seeds"] == "0-11"
    assert len({json.dumps(found) for found in guidance}) == POINTS
    for found, row in zip(guidance, results(swept), strict=True):
        assert (found["divergence"], found["scale"]) == (row["divergence"], row["scale"])
        assert row["epsilon"] in (None, found["epsilon"])


def test_figures_are_those_of_the_images(swept):
    lab = Lab()
    for row in results(swept)[::3]:
        (path,) = (swept / row["folder"]).glob("samples_*.npz")
        with np.load(path) as file:
            images, labels = (torch.from_numpy(file[name]) for name in ("arr_0", "arr_1"))
        images = images.movedim(-1, 1).float() / 127.5 - 1
        # as an .npz keeps them: 16 levels, cut off to 256
        real = lab.features((((lab.train.images + 1) * 127.5).floor()) / 127.5 - 1)
        fake = lab.features(images)
        assert row["fid"] == pytest.approx(frechet_distance(fake, real), rel=1e-5)
        assert (row["precision"], row["recall"]) == pytest.approx(precision_recall(real, fake), abs=2e-3)
        assert row["accuracy"] == pytest.approx((lab.judged(images) == labels).double().mean().item())
    assert len({row["fid"] for row in results(swept)}) == POINTS


def test_table_and_picture(swept):
    rows = list(csv.DictReader((swept / "results.csv").open()))
    assert [float(row["fid"]) for row in rows] == [row["fid"] for row in results(swept)] and rows[0]["alpha"] == ""
    if importlib.util.find_spec("matplotlib"):
        assert (swept / "frontier.png").read_bytes()[1:4] == b"PNG"


def test_what_is_finished_is_kept_and_the_grid_may_grow(swept, sampled, no_pictures, monkeypatch):
    before = results(swept)
    assert main([*OPTIONS, *GRID, "--out", str(swept)]) == 0
    assert sampled == [] and results(swept) == before
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "write_sweep", lambda *_: None)
        assert main([*OPTIONS, "--divergence", "js", "--scale", "0.2,0.3", "--out", str(swept)]) == 0
    assert [(name[:16], missing) for name, missing in sampled] == [("js-a1-e0.9-s0.3-", [0, 1])]


class Killed(BaseException):
    """What nobody catches."""


def test_a_killed_sweep_goes_on(swept, sampled, no_pictures, tmp_path, monkeypatch):
    write = Shards.write

    def kill(self, batch, *what):
        # at the second point, when one of its two batches is there
        if batch == 1 and len(list(self.folder.parent.parent.iterdir())) == 2:
            raise Killed
        write(self, batch, *what)

    command = [*OPTIONS, *GRID, "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Shards, "write", kill)
        main(command)
    assert len(results(tmp_path)) == 1
    sampled.clear()
    assert main(command) == 0
    # the rest of the second point, and the others whole
    assert [missing for _, missing in sampled] == [[1], *[[0, 1]] * (POINTS - 2)]
    assert results(tmp_path) == results(swept)


def test_rank_0_alone_loads_the_judge(tmp_path, monkeypatch):
    store, made = distributed.HashStore(), []
    teams = [Team(Interrupts(pytest.fail), rank, 2, store) for rank in range(2)]
    measure = SimpleNamespace(check=lambda: made.append("checked"))
    for team in teams:
        run_series([], tmp_path, lambda: made.append("made") or measure, team, pytest.fail)
    assert made == ["made", "checked"]
    # and that is where the sweep's own is made
    monkeypatch.setattr(checkpoints, "load_judge", pytest.fail)
    monkeypatch.setattr(sweep, "run_series", lambda *_: None)
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0


@pytest.mark.full
def test_two_processes_sweep_as_one(swept, tmp_path):
    command = [*TORCHRUN, "calguide_fast", *OPTIONS, *GRID, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and done.stdout.split() == [str(tmp_path / "results.json")], done.stderr
    assert results(tmp_path) == results(swept)
    runs = [json.loads(path.read_text())["runs"] for path in tmp_path.glob("points/*/config.json")]
    assert [len(run["processes"]) for (run,) in runs] == [2] * POINTS


def test_other_measures_need_no_samples(swept, sampled, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "write_sweep", lambda *_: None)
    (path,) = swept.glob("points/none-s0.2-*/figures.json")
    kept = json.loads(path.read_text())
    # as features were whose code has changed since
    other = {**kept["measured_with"], "source_sha256": "0ld"}
    path.write_text(json.dumps({**kept, "measured_with": other, "figures": {}}))
    assert main([*OPTIONS, "--divergence", "none", "--scale", "0.2", "--out", str(swept)]) == 0
    assert json.loads(path.read_text()) == kept and sampled == []
    said = f"{path.parent.name} was measured otherwise, and is measured again: source_sha256: 0ld there, None here"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "1,x"], r"scale='1,x' must be numbers with commas"),
        (["--alpha", "1,1"], r"alpha='1,1' must be different values"),
        (["--scale", "1,1.0"], r"scale='1,1.0' must be different values"),
        (["--divergence", "jss"], r"divergence='?jss"),
        (["--recipe", "unguided"], "nothing to sweep"),
        (["--max-guidance", "0.1"], "max_guidance='0.1' has no effect with rule='score', whose strength is scale"),
        (["--classifier-judge", "resnet50:x"], "takes no classifier-judge"),
        (["--preset", "imagenet128", "--unet", "u", "--classifier", "resnet50:x"], "needs a measure: --reference"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_refused(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([*OPTIONS, *options, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
