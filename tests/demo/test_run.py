from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from PIL import Image

from calguide_fast.demo.experiment import Lab, class_cycle, draw, measure_real, trace_gradients
from calguide_fast.demo.methods import METHODS
from calguide_fast.demo.run import Plan, run_demo

TINY = Plan(images=20, runs=1, steps="3", batch_size=10, traced=10)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def lab():
    return Lab()


def figures_of(folder):
    """Everything in the results but the clock's readings."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for method in results["methods"]:
        for figures in (method["mean"], *method["runs"]):
            del figures["seconds"], figures["images_per_second"]
    return results["methods"], results["gradients"], results["real_training_digits"]


def test_a_small_demo_writes_everything_twice_the_same(tmp_path, capsys):
    folder = run_demo(tmp_path / "a", plan=TINY)
    assert "Jensen–Shannon" in capsys.readouterr().out
    names = [method.name for method in METHODS]
    for name in ["contact_sheet", "gradient_norms", *(f"grids/{name}" for name in names)]:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) >= 100, name
            assert len(np.unique(picture.convert("L"))) > 10, name
    methods, gradients, _ = figures_of(folder)
    assert [method["name"] for method in methods] == names
    assert all(method["mean"]["gradient_norm"] > 0 for method in methods if method["guidance"])
    assert len(gradients["timesteps"]) == 3
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert all(f"| {method.title} |" in text for method in METHODS)

    assert figures_of(run_demo(tmp_path / "b", plan=TINY, progress=False)) == figures_of(folder)
    assert capsys.readouterr().out == ""


def test_a_sweep_keeps_the_strength_nearest_to_the_training_digits(tmp_path):
    plan = Plan(images=10, runs=2, steps="2", batch_size=10, traced=10, tuned=10)
    folder = run_demo(tmp_path, plan=plan, methods=[BY_NAME["unguided"], BY_NAME["elucd"]], progress=False)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    points = results["sweep"]["elucd"]
    assert [point["strength"] for point in points] == list(BY_NAME["elucd"].strengths)
    best = min(points, key=lambda point: point["frechet_train"])["strength"]
    unguided, elucd = results["methods"]
    assert elucd["strength"] == elucd["guidance"]["scale"] == best
    assert unguided["strength"] is None and "unguided" not in results["sweep"]
    a, b = (run["frechet"] for run in elucd["runs"])
    assert a != b and elucd["mean"]["frechet"] == pytest.approx((a + b) / 2)
    assert elucd["std"]["frechet"] == pytest.approx(abs(a - b) / 2**0.5)
    assert (folder / "frontier.png").stat().st_size > 10_000
    assert "±" in (folder / "results.md").read_text(encoding="utf-8")


def test_every_method_may_try_equally_many_strengths():
    assert {len(method.strengths) for method in METHODS if method.strength is not None} == {6}
    assert all(method.strength in method.strengths for method in METHODS if method.strength is not None)


def test_guidance_mends_the_class_on_the_same_noise(lab):
    samples = {name: draw(lab, BY_NAME[name], 0, 60, "25", 60)[0] for name in ("unguided", "elucd")}
    assert torch.equal(samples["unguided"].seeds, samples["elucd"].seeds)
    right = {name: (lab.judged(s.images) == s.labels).double().mean().item() for name, s in samples.items()}
    assert right["elucd"] > 0.95 > right["unguided"] > 0.6


def test_real_digits_are_the_nearest_to_real_digits(lab):
    floor = measure_real(lab, 500)
    assert floor.accuracy > 0.98 and floor.precision > 0.85 and floor.recall > 0.85
    assert 0 < floor.frechet < 6
    assert floor.frechet_train < floor.frechet


def test_the_overconfident_twin_saturates_but_its_constant_push_stays(lab):
    trace = trace_gradients(lab, count=20, run=3, steps="8")
    assert trace.timesteps[0] == 999 and trace.timesteps[-1] == 0

    def fall(classifier: str, term: str) -> float:
        medians = [median for _, median, _ in trace.norms[classifier][term]]
        return max(medians) / min(medians)

    assert min(trace.doubt["overconfident twin"]) < 1e-3 * min(trace.doubt["guide"])
    for classifier in trace.norms:
        assert fall(classifier, "log p, τ₂=½") < 4
        assert fall(classifier, "log p, τ₂=1") > 30 * fall(classifier, "log p, τ₂=½")
    assert fall("overconfident twin", "log p, τ₂=1") > 100 * fall("guide", "log p, τ₂=1")


def test_labels_go_round():
    assert class_cycle(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
