from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synthetic import predictions

from calguide_fast.calibration import TemperatureScaling, VectorScaling, measure_calibration, vector


@pytest.mark.parametrize(("count", "classes", "overconfidence", "penalty"), [(300, 4, 3.0, 1.0), (80, 10, 0.3, 0.05)])
def test_it_is_the_minimum_that_scipy_finds(count, classes, overconfidence, penalty, monkeypatch):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn, in the demo extra")
    logits, labels = predictions(count, classes, overconfidence)
    monkeypatch.setattr(vector, "_BLOCK", 37)  # blocks that do not divide the samples

    def loss(parameters):
        parameters = torch.tensor(parameters, requires_grad=True)
        weight, bias = parameters.chunk(2)
        prior = ((weight - 1).square().sum() + bias.square().sum()) * penalty / (2 * count)
        value = F.cross_entropy(weight * logits + bias, labels) + prior
        return value.item(), torch.autograd.grad(value, parameters)[0].numpy()

    start = np.zeros(2 * classes)
    expected = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}).x
    scaling = VectorScaling(classes, penalty).fit(logits, labels)
    assert scaling.converged
    np.testing.assert_allclose(torch.cat([scaling.weight, scaling.bias]), expected, atol=2e-6)


def test_known_scales_and_biases_are_undone():
    logits, labels = predictions(20000, 3)
    weight, bias = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.5, -1.0, 0.5]).double()
    distorted = weight * logits + bias
    scaling = VectorScaling(3).fit(distorted, labels)
    torch.testing.assert_close(scaling.weight, 1 / weight, rtol=0.06, atol=0)
    before, after = (measure_calibration(f, labels) for f in (distorted, scaling(distorted)))
    assert after.smooth_ece < 0.2 * before.smooth_ece and after.cross_entropy < before.cross_entropy


def test_it_fits_no_worse_than_a_temperature():
    logits, labels = predictions(500, 5, overconfidence=4.0)
    by_vector = VectorScaling(5, penalty=1e-6).fit(logits, labels)(logits)
    by_temperature = TemperatureScaling().fit(logits, labels)(logits)
    assert F.cross_entropy(by_vector, labels) <= F.cross_entropy(by_temperature, labels)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_separated_data_converge_to_finite_scales(magnitude):
    labels = torch.arange(30) % 3
    scaling = VectorScaling(3, penalty=1e-2).fit(magnitude * F.one_hot(labels, 3).double(), labels)
    assert scaling.converged and scaling.weight.isfinite().all()


def test_a_search_that_ends_early_says_so(monkeypatch):
    monkeypatch.setattr(vector, "_MOST_STEPS", 1)
    scaling = VectorScaling(4)
    with pytest.warns(RuntimeWarning, match="has not converged within 1 Newton steps"):
        scaling.fit(*predictions(200, 4, overconfidence=5.0))
    assert not scaling.converged


def test_calling_keeps_the_dtype_and_wraps():
    scaling = VectorScaling(3)
    assert scaling(torch.ones(2, 3).half()).dtype == torch.float16
    assert torch.equal(scaling.wrap(lambda x: 2 * x)(torch.ones(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 1]), "logits has 4 classes; it must have num_classes=3"),
        (torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([0]), "vector scaling needs finite ones"),
        (torch.zeros(1, 3), torch.tensor([-1]), r"labels\[0\]=-1 is out of range"),
    ],
)
def test_unusable_data_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        VectorScaling(3).fit(logits, labels)


def test_unusable_settings_are_named():
    with pytest.raises(ValueError, match="num_classes=0 must be"):
        VectorScaling(0)
    with pytest.raises(ValueError, match="penalty=0 must be"):
        VectorScaling(3, penalty=0)
