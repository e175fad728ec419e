from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic import predictions

pytest.importorskip("matplotlib", reason="diagrams need matplotlib, of the demo extra")

from matplotlib.figure import Figure
from PIL import Image

from calguide_fast.calibration import (
    NoiseLevelCalibration,
    TemperatureScaling,
    calibration_diagram,
    noise_level_diagram,
    reliability_curve,
    reliability_diagram,
    top_label,
)

LOGITS, LABELS = predictions(800, overconfidence=3.0)
LEVELS = NoiseLevelCalibration(
    torch.tensor([1, 50]), torch.tensor([0.01, 3.0]), *torch.tensor([[0.02, 0.4], [0.9, 0.3], [0.92, 0.7], [0.2, 2.0]])
)


def ink(path) -> int:
    """How many grey levels a picture shows."""
    with Image.open(path) as picture:
        assert min(picture.size) >= 400
        return len(np.unique(picture.convert("L")))


def test_a_reliability_diagram_is_drawn_from_predictions_or_from_a_curve(tmp_path):
    confidence, correct = top_label(LOGITS, LABELS)
    figure = reliability_diagram(confidence, correct, path=tmp_path / "a.png", title="a classifier")
    curve = reliability_curve(confidence, correct)
    reliability_diagram(curve, path=tmp_path / "b.png", title="a classifier")
    assert ink(tmp_path / "a.png") > 20
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    (axes,) = figure.axes
    assert axes.get_title().startswith(f"a classifier\nsmECE {curve.smooth_ece:.4f} at bandwidth")
    assert "n = 800" in axes.get_title()
    # the line runs where the curve says
    pieces = np.array(axes.collections[-1].get_segments())
    drawn = pieces[len(pieces) // 2, 0]
    index = round(drawn[0] * 400)
    assert drawn[1] == pytest.approx(curve.t[index] + curve.accuracy[index] - curve.confidence[index])


def test_it_draws_into_axes_of_the_caller(tmp_path):
    figure = Figure()
    axes = figure.subplots(1, 2)[1]
    assert reliability_diagram(*top_label(LOGITS, LABELS), axes=axes, bootstrap=0) is figure
    assert "smECE" in axes.get_title()


@pytest.mark.parametrize(("confidence", "correct"), [([1.0], [True]), ([0.0, 1.0], [0, 0]), ([0.5] * 5, [1] * 5)])
def test_degenerate_predictions_are_drawn(confidence, correct, tmp_path):
    reliability_diagram(torch.tensor(confidence), torch.tensor(correct), path=tmp_path / "a.png")
    assert ink(tmp_path / "a.png") > 5


def test_before_and_after_stand_side_by_side(tmp_path):
    after = TemperatureScaling().fit(LOGITS, LABELS)(LOGITS)
    figure = calibration_diagram(LOGITS, after, LABELS, "temperature", path=tmp_path / "a.png")
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == ["before", "after temperature scaling"] and ink(tmp_path / "a.png") > 20


def test_noise_levels_are_drawn_for_one_and_for_several(tmp_path):
    noise_level_diagram(LEVELS, path=tmp_path / "a.png")
    figure = noise_level_diagram({"base": LEVELS, "fine-tuned": LEVELS}, path=tmp_path / "b.png")
    assert ink(tmp_path / "a.png") > 20 and ink(tmp_path / "b.png") > 20
    assert figure.axes[0].get_xscale() == "log" and len(figure.axes[1].lines) == 4
    with pytest.raises(ValueError, match="no calibration to draw"):
        noise_level_diagram({})


def test_what_does_not_go_together_is_refused():
    curve = reliability_curve(*top_label(LOGITS, LABELS), bootstrap=0)
    with pytest.raises(TypeError, match="give no outcomes and no settings"):
        reliability_diagram(curve, bandwidth=0.1)
    with pytest.raises(TypeError, match="correct must be given"):
        reliability_diagram(torch.tensor([0.5]))


def test_matplotlib_is_only_needed_for_pictures():
    script = """
import sys
sys.modules["matplotlib"] = None
import torch
from calguide_fast.calibration import reliability_curve, reliability_diagram
curve = reliability_curve(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))
try:
    reliability_diagram(curve)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "diagrams need matplotlib" in done.stdout and "calguide_fast[demo]" in done.stdout, done.stderr
