from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from PIL import Image

from calguide_fast.demo.calibration import (
    ARMS,
    BASE,
    GUIDED,
    TEMPERATURE,
    CalibrationPlan,
    FreshlyAugmented,
    Guided,
    best_scale,
    measure_held_out,
    smooth_ece_by_chance,
    study_calibration,
)
from calguide_fast.demo.calibration_report import results
from calguide_fast.demo.checkpoints import load_guide
from calguide_fast.demo.data import few_labels, load_split
from calguide_fast.demo.experiment import Figures, Lab
from calguide_fast.demo.methods import METHODS
from calguide_fast.demo.run import FULL, QUICK, Plan, run_demo

TINY = CalibrationPlan(
    recipe=replace(CalibrationPlan().recipe, labels=100, epochs=4),
    seeds=2,
    calibration_labels=100,
    validation_labels=100,
    epochs=2,
    fine_tuning_batch=100,
    learning_rates=(1e-4, 3e-3),
    loss_weights=(1.0,),
    methods=(replace(GUIDED[0], strengths=(0.5, 8.0)),),
    images=10,
    steps="2",
    batch_size=10,
    traced=10,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan = Plan(images=10, steps="2", batch_size=10, traced=10, calibration=TINY)
    return run_demo(tmp_path_factory.mktemp("demo"), plan=plan, methods=METHODS[:1], progress=False)


@pytest.fixture
def found(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["calibration"]


def test_the_demo_writes_the_study(folder, found):
    assert list(found["held_out"]) == list(ARMS)
    assert len(found["guided"]) == 2 * len(ARMS) and all(len(point["runs"]) == 2 for point in found["guided"])
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert text.count("(best)") == len(ARMS) and all(f"| {title} |" in text for title in ARMS.values())
    with Image.open(folder / "calibration.png") as picture:
        assert min(picture.size) > 900 and len(np.unique(picture.convert("L"))) > 10


def test_every_arm_keeps_its_best_setting_on_the_validation_digits(found):
    for arm, points in found["sweep"].items():
        assert [point["learning_rate"] for point in points] == [1e-4, 3e-3]
        assert found["chosen"][arm] == min(points, key=lambda point: point["smooth_ece"])


def test_a_temperature_moves_the_confidences_and_no_top_label(found):
    base, scaled = (found["held_out"][arm] for arm in (BASE, TEMPERATURE))
    assert [run["accuracy"] for run in base["runs"]] == [run["accuracy"] for run in scaled["runs"]]
    assert base["mean"]["confidence"] != scaled["mean"]["confidence"]


def test_only_the_full_demo_studies_calibration():
    assert QUICK.calibration is None
    assert FULL.calibration is not None and FULL.calibration.seeds >= 3


def test_threads_change_nothing_not_even_the_callers_random_state(found):
    lab = Lab()
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        study = study_calibration(lab, TINY, pool, lambda *_: None)
    assert torch.equal(torch.get_rng_state(), state)
    again = json.loads(json.dumps(results(study)))
    for name in ("sweep", "temperatures", "held_out", "gradients"):
        assert again[name] == found[name], name
    for ours, theirs in zip(again["guided"], found["guided"], strict=True):
        for clock in ("seconds", "images_per_second"):
            for figures in (ours, theirs):
                for row in (figures["mean"], figures["std"], *figures["runs"]):
                    row.pop(clock)
        assert ours == theirs
    # the base classifiers differ by their seed
    first, second = found["held_out"][BASE]["runs"]
    assert first != second


def test_the_splits_share_no_digit():
    train, test = load_split()
    plan = CalibrationPlan()
    sizes = (plan.recipe.labels, plan.calibration_labels, plan.validation_labels)
    parts = [few_labels(train, size, skip=sum(sizes[:i])) for i, size in enumerate(sizes)]
    for part, size in zip(parts, sizes):
        assert torch.bincount(part.labels).tolist() == [size // 10] * 10
    seen = torch.cat([part.images for part in [*parts, test]]).flatten(1)
    assert len(seen.unique(dim=0)) == len(seen)


def test_every_pass_is_augmented_anew_and_every_arm_sees_the_same():
    digits = few_labels(load_split()[0], 50)
    first, second = FreshlyAugmented(digits, 30, seed=3), FreshlyAugmented(digits, 30, seed=3)
    (images, labels), (_, rest) = first
    assert len(labels) == 30 and sorted(torch.cat([labels, rest]).tolist()) == digits.labels.tolist()
    assert torch.equal(next(iter(second))[0], images)
    assert not torch.equal(next(iter(first))[0], images)


def test_the_overconfident_twin_is_further_off_than_by_chance():
    found = measure_held_out(load_guide(overconfident=True), load_split()[1])
    assert found.confidence > found.accuracy + 0.02
    assert found.smooth_ece > 2 * found.by_chance > 0


def test_chance_fades_with_the_number_of_samples_and_is_nil_for_certainty():
    few, many = (smooth_ece_by_chance(torch.linspace(0.5, 1, n), draws=50) for n in (200, 20_000))
    assert 2 * many < few < 1 / 200**0.5
    assert smooth_ece_by_chance(torch.ones(100), draws=5) == 0


def test_the_best_scale_is_chosen_on_the_training_digits():
    zero = Figures(*[0.0] * 8)
    near = Guided(BASE, "elucd", 0.1, [replace(zero, frechet_train=2.0, frechet=9.0), replace(zero, frechet_train=4.0)])
    far = Guided(BASE, "elucd", 0.2, [replace(zero, frechet_train=1.0), replace(zero, frechet_train=6.0)])
    assert best_scale([far, near]) is near
