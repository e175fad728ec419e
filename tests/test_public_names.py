"""What `import calguide_fast` brings within reach, and what it leaves alone until it is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import calguide_fast
from calguide_fast import guidance_gradient, smooth_ece


def test_parts_are_reached_without_an_import_of_their_own():
    code = (
        "import sys, calguide_fast as cf\n"
        "late = [name for name in ('calguide_fast.evaluation', 'PIL.Image') if name in sys.modules]\n"
        "assert not late, late\n"
        "assert {'calibration', 'evaluation', 'models', 'schedule', 'FDivSampler'} <= set(dir(cf))\n"
        "print(cf.evaluation.frechet_distance.__name__, cf.models.resnet50.__name__, cf.schedule.Schedule.__name__,\n"
        "      cf.calibration.TemperatureScaling.__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["frechet_distance", "resnet50", "Schedule", "TemperatureScaling"], run.stderr


def test_the_version_is_one():
    root = Path(__file__).parent.parent
    for name, pattern in (
        ("pyproject.toml", r'^version = "(.*)"$'),
        ("CITATION.cff", r"^version: (.*)$"),
        ("CHANGELOG.md", r"^## (.*)$"),
    ):
        assert re.search(pattern, (root / name).read_text(), re.MULTILINE)[1] == calguide_fast.__version__, name


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'calguide_fast' has no attribute 'benchmarks'"):
        calguide_fast.benchmarks  # noqa: B018 - the access is what is tested


def test_an_array_is_told_how_to_become_a_tensor():
    array, labels = np.array([0.5, 0.9]), torch.tensor([0, 1])
    for call in (
        lambda: smooth_ece(array, labels),
        lambda: smooth_ece(torch.tensor([0.5, 0.9]), array),
        lambda: guidance_gradient(torch.zeros(2, 3), array),
    ):
        with pytest.raises(TypeError, match="must be a torch.Tensor, got ndarray; torch.from_numpy makes one of it"):
            call()
