"""``calguide-fast reliability`` and ``calibrate``, end to end."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic import predictions

from calguide_fast.calibration import TemperatureScaling, measure_calibration, top_label
from calguide_fast.calibration.files import read_predictions
from calguide_fast.cli import main

LOGITS, LABELS = predictions(600, 3, overconfidence=3.0)
TEST_LOGITS, TEST_LABELS = predictions(600, 3, overconfidence=3.0, seed=1)
CONFIDENCE, CORRECT = top_label(LOGITS, LABELS)
EXPECTED = measure_calibration(LOGITS, LABELS)


@pytest.fixture
def logits_file(tmp_path):
    path = tmp_path / "logits.npz"
    np.savez(path, logits=LOGITS.numpy(), labels=LABELS.numpy())
    return path


def write_csv(path, names, *columns):
    lines = [",".join(names), *(",".join(map(str, row)) for row in zip(*columns))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def check_picture(path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the demo extra")
    from PIL import Image

    with Image.open(path) as picture:
        assert min(picture.size) >= 400 and len(np.unique(picture.convert("L"))) > 20


def test_reliability_of_logits_on_the_screen(logits_file, capsys):
    assert main(["reliability", str(logits_file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["smooth_ece"] == pytest.approx(EXPECTED.smooth_ece, abs=1e-9)
    assert found["accuracy"] == EXPECTED.accuracy and found["samples"] == 600
    assert found["confidence"] == pytest.approx(EXPECTED.confidence)


def test_reliability_writes_json_and_a_picture(logits_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the demo extra")
    out, figures = tmp_path / "new" / "a.png", tmp_path / "other" / "a.json"
    assert main(["reliability", str(logits_file), "--out", str(out), "--json", str(figures), "--bandwidth", "0.1"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(figures.read_text())["bandwidth"] == pytest.approx(0.1)
    check_picture(out)


def test_figures_are_not_lost_with_a_file_that_cannot_be_written(logits_file, tmp_path, capsys):
    with pytest.raises(SystemExit, match="calguide-fast: .*Is a directory"):
        main(["reliability", str(logits_file), "--json", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["samples"] == 600


def test_calibrate_by_temperature(logits_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the demo extra")
    held_out = tmp_path / "test.npz"
    np.savez(held_out, logits=TEST_LOGITS.numpy(), labels=TEST_LABELS.numpy())
    out = tmp_path / "a.png"
    assert main(["calibrate", str(logits_file), "--test", str(held_out), "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    scaling = TemperatureScaling().fit(LOGITS, LABELS)
    assert found["method"] == "temperature" and found["at_bound"] is False
    assert found["temperature"] == pytest.approx(scaling.temperature.item()) == pytest.approx(3, rel=0.2)
    assert found["fitted_on"]["before"] == pytest.approx(EXPECTED._asdict())
    tested = found["tested_on"]
    assert tested["after"] == pytest.approx(measure_calibration(scaling(TEST_LOGITS), TEST_LABELS)._asdict())
    assert tested["after"]["smooth_ece"] < 0.5 * tested["before"]["smooth_ece"]
    check_picture(out)


def test_calibrate_by_vector(logits_file, tmp_path):
    figures = tmp_path / "a.json"
    assert main(["calibrate", str(logits_file), "--method", "vector", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["converged"] is True and len(found["weight"]) == len(found["bias"]) == 3
    assert found["fitted_on"]["after"]["cross_entropy"] < found["fitted_on"]["before"]["cross_entropy"]


def test_every_form_of_file_says_the_same(tmp_path):
    logits, probabilities = LOGITS.numpy(), LOGITS.softmax(1).numpy()
    labels, confidence, correct = LABELS.numpy(), CONFIDENCE.numpy(), CORRECT.numpy()
    np.savez(tmp_path / "a.npz", logits=logits, y=labels.astype(float), other=np.zeros(1))
    np.savez(tmp_path / "b.npz", probs=probabilities, targets=labels)
    np.savez(tmp_path / "c.npz", confidence=confidence, correct=correct)
    write_csv(tmp_path / "d.csv", ["name", "logits_0", "logits_1", "logits_2", "label"], range(600), *logits.T, labels)
    write_csv(tmp_path / "e.csv", ["correct", "confidences"], correct, confidence)
    write_csv(tmp_path / "f.csv", ["prob_2", "prob_0", "prob_1", "label"], *probabilities.T[[2, 0, 1]], labels)
    for path in sorted(tmp_path.iterdir()):
        found = read_predictions(path)
        torch.testing.assert_close(found.confidence, CONFIDENCE, rtol=1e-9, atol=0, msg=str(path))
        assert torch.equal(found.correct.bool(), CORRECT), path
        assert (found.logits is None) == (path.stem in "ce")
        if found.logits is not None:
            torch.testing.assert_close(found.logits.log_softmax(1), LOGITS.log_softmax(1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": np.zeros((2, 3))}, "holds logits; a file must hold"),
        ({"logits": np.zeros((2, 3)), "labels": np.array([0, 3])}, r"labels\[1\]=3 is out of range"),
        ({"logits": np.zeros((2, 3)), "labels": np.array([0, 0.5])}, "labels must be whole numbers"),
        ({"logits": np.zeros(3), "labels": np.zeros(3)}, r"logits has shape \(3,\); it must be \(n, C\)"),
        ({"probs": np.ones((2, 3)), "labels": np.zeros(2)}, "rows that sum to 1"),
        ({"confidence": np.array([0.5, 1.5]), "correct": np.ones(2)}, r"confidence\[1\]=1.5 must lie in"),
        ({"confidence": np.ones(2), "correct": np.array([0, 2])}, r"correct\[1\]=2.0 must be 0 or 1"),
        ({"confidence": np.ones(2), "correct": np.ones(3)}, "correct has shape"),
        ({"confidence": np.array([1j]), "correct": np.ones(1)}, "dtype complex128"),
    ],
)
def test_unusable_arrays_are_one_line(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SystemExit, match=message) as stop:
        main(["reliability", str(tmp_path / "a.npz")])
    assert str(stop.value).startswith("calguide-fast: ") and "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "confidence,correct\n0.5,1\n0.5\n", "line 3: 1 values for 2 columns"),
        ("a.csv", "confidence,correct\n0.5,maybe\n", "correct must be numbers"),
        ("a.csv", "confidence,correct\n", "at least one line of numbers"),
        ("a.csv", "logits_0,logits_2,label\n1,2,0\n", "numbered 0, 1, 2, … without a gap"),
        ("a.csv", "x,y\n1,2\n", "holds x, y; a file must hold logits"),
        ("a.npz", "no zip", "is no readable .npz file"),
        ("a.npz", "", "is no readable .npz file"),
        ("a.txt", "", "must be an .npz or a .csv file"),
    ],
)
def test_unusable_files_are_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        main(["reliability", str(tmp_path / name)])


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing.npz"):
        main(["reliability", str(tmp_path / "nothing.npz")])
    write_csv(tmp_path / "a.csv", ["confidence", "correct"], [0.5], [1])
    with pytest.raises(SystemExit, match="holds confidences alone"):
        main(["calibrate", str(tmp_path / "a.csv")])


def test_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", logits=np.array([{}]), labels=np.zeros(1))
    with pytest.raises(SystemExit, match="cannot be read: .*allow_pickle"):
        main(["reliability", str(tmp_path / "a.npz")])


def test_it_runs_as_a_program(logits_file):
    command = [sys.executable, "-m", "calguide_fast", "reliability", str(logits_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 600, done.stderr


@pytest.mark.parametrize("command", ["reliability", "calibrate"])
def test_help_names_what_a_file_holds(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "probabilities (n, C)" in text and "confidences (n,)" in text
