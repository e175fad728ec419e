"""How the points of a study are measured, where the preset does not bring its own measure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from calguide_fast.evaluation import frechet_distance
from calguide_fast.models import resnet18
from calguide_fast.models.specs import LoadedClassifier
from calguide_fast.studies.measure import Judge, Measure

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples_6x8x8x3.npz"
    np.savez(path, arr_0=PIXELS, arr_1=LABELS)
    return path


def pooled(images):
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, 1).flatten(1)


def test_a_resnet_judges_at_224_pixels(samples, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "resnet18.pth"
    resnet = resnet18(num_classes=3).eval()
    torch.save(resnet.state_dict(), path)
    judge = Judge.of(f"resnet18:{path}")
    large = np.stack(
        [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in PIXELS]
    )
    x = torch.tensor(large).movedim(-1, 1) / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        seen = resnet((x - mean) / std).argmax(1).numpy()
    assert judge.accuracy(samples, 4, "cpu") == pytest.approx((seen == LABELS).mean())
    # all right, and all wrong
    for labels, expected in ((seen, 1.0), ((seen + 1) % 3, 0.0)):
        np.savez(samples, arr_0=PIXELS, arr_1=labels)
        assert judge.accuracy(samples, 4, "cpu") == expected
    assert judge.name == f"resnet18 {hashlib.sha256(path.read_bytes()).hexdigest()}"


class NoiseAware(nn.Module):
    num_classes = 3

    def forward(self, x, t):
        assert t.tolist() == [0] * len(x) and x.shape[1:] == (3, 8, 8)
        return x.mean((2, 3))


def test_a_noise_aware_judge_sees_hardly_any_noise(samples):
    judge = Judge(LoadedClassifier(NoiseAware(), "xt", "imagenet64"), "noise-aware")
    expected = (PIXELS.mean((1, 2)).argmax(1) == LABELS).mean()
    assert judge.accuracy(samples, 4, "cpu") == pytest.approx(expected)


def test_figures_and_what_they_were_measured_with(samples, tmp_path):
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=255 - PIXELS)
    found = Measure(reference, "reference", pooled, batch_size=4)
    measured = found(samples)
    tables = [pooled(torch.tensor(images).movedim(-1, 1)) for images in (PIXELS, 255 - PIXELS)]
    assert measured["figures"]["fid"] == pytest.approx(frechet_distance(*tables))
    assert set(measured["figures"]) == {"fid", "precision", "recall"} and measured["samples"] == 6
    judge = Judge(LoadedClassifier(NoiseAware(), "xt", "imagenet64"), "noise-aware")
    others = [
        Measure(reference, "another", pooled),
        Measure(reference, "reference", pooled, judge=judge),
        Measure(reference, "reference", pooled, metrics=("fid",)),
        Measure(reference, "reference", lambda images: pooled(images)),
    ]
    assert all(other.settings != found.settings for other in others)
    assert Measure(reference, "reference", pooled, batch_size=64).settings == found.settings
    assert found.settings["source_sha256"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_two_networks_of_one_class_are_two_measures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "class Net:\n def __init__(self, scale): self.scale = scale\n def __call__(self, x): return self.scale * x\n"
    (tmp_path / "own_networks.py").write_text(code + "small, large = Net(1), Net(2)\n")
    small, large = (Measure("reference", "", f"own_networks:{name}").settings for name in ("small", "large"))
    assert small["source_sha256"] == large["source_sha256"] and small != large
