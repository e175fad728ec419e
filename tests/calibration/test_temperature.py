from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from synthetic import predictions
from torch import nn

from calguide_fast import FDivSampler
from calguide_fast.calibration import CalibratedClassifier, TemperatureScaling


@pytest.mark.parametrize("overconfidence", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_it_is_the_minimum_that_scipy_finds(overconfidence):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn, in the demo extra")
    logits, labels = predictions(500, 7, overconfidence)

    def loss(log_t):
        return F.cross_entropy(logits / torch.tensor(log_t).double().exp(), labels).item()

    expected = optimize.minimize_scalar(loss, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-9})
    scaling = TemperatureScaling().fit(logits, labels)
    assert scaling.temperature.log().item() == pytest.approx(expected.x, abs=1e-6)
    assert not scaling.at_bound and abs(scaling.slope) < 1e-9


def test_the_known_temperature_is_found_and_does_not_depend_on_the_start():
    logits, labels = predictions(20000, 5, overconfidence=2.5)
    found = [TemperatureScaling(start).fit(logits, labels).temperature.item() for start in (0.01, 1.0, 100.0)]
    assert found[0] == found[1] == found[2] == pytest.approx(2.5, rel=0.03)
    # logits in other units: the temperature follows
    assert TemperatureScaling().fit(8 * logits, labels).temperature.item() == pytest.approx(8 * found[0], rel=1e-10)


def test_single_precision_logits_give_the_same_temperature():
    logits, labels = predictions(1000, overconfidence=3.0)
    exact = TemperatureScaling().fit(logits.float().double(), labels).temperature
    assert torch.equal(TemperatureScaling().fit(logits.float(), labels).temperature, exact)


def test_separated_data_end_at_the_lower_bound():
    labels = torch.arange(6) % 3
    logits = 0.1 * F.one_hot(labels, 3).double()
    scaling = TemperatureScaling(bounds=(0.05, 10)).fit(logits, labels)
    assert scaling.at_bound and scaling.temperature.item() == pytest.approx(0.05)
    # so far ahead that every slope underflows to 0
    assert TemperatureScaling().fit(1e5 * logits, labels).temperature.item() == pytest.approx(0.01)


def test_logits_that_point_away_end_at_the_upper_bound():
    labels = torch.arange(6) % 3
    scaling = TemperatureScaling().fit(-5.0 * F.one_hot(labels, 3).double(), labels)
    assert scaling.at_bound and scaling.temperature.item() == pytest.approx(100.0)


def test_logits_without_an_opinion_leave_temperature_one():
    scaling = TemperatureScaling(temperature=3.0).fit(torch.full((4, 3), 7.0), torch.zeros(4, dtype=torch.long))
    assert scaling.temperature == 1.0 and not scaling.at_bound


def test_one_sample_and_one_class_are_served():
    assert TemperatureScaling().fit(torch.tensor([[2.0, 1.0]]), torch.tensor([0])).at_bound
    assert TemperatureScaling().fit(torch.tensor([[2.0]]), torch.tensor([0])).temperature == 1.0


def test_masked_classes_take_no_part():
    logits, labels = predictions(400, 3, overconfidence=2.0)
    masked = torch.cat([logits, torch.full((400, 2), -torch.inf).double()], 1)
    expected = TemperatureScaling().fit(logits, labels).temperature
    assert TemperatureScaling().fit(masked, labels).temperature.item() == pytest.approx(expected.item(), rel=1e-12)
    assert TemperatureScaling(2.0)(masked)[0, 4] == -torch.inf


def test_calling_divides_and_keeps_dtype_and_gradients():
    scaling = TemperatureScaling(2.0)
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(scaling(logits), logits / 2) and scaling(logits).dtype == torch.bfloat16
    scaling(logits).sum().backward()
    assert torch.equal(logits.grad, torch.full_like(logits, 0.5))


def test_it_is_saved_with_its_module():
    scaling = TemperatureScaling().fit(*predictions(100, overconfidence=2.0))
    other = TemperatureScaling()
    other.load_state_dict(scaling.state_dict())
    assert torch.equal(other.temperature, scaling.temperature) and scaling.temperature != 1


def test_a_wrapped_classifier_guides():
    class Classifier(nn.Module):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(4)

        def forward(self, x, t=None):
            return self.linear(x.flatten(1)) + (0 if t is None else t[:, None])

    classifier = Classifier()
    classifier.norm.eval()
    wrapped = TemperatureScaling(4.0).wrap(classifier)
    assert isinstance(wrapped, CalibratedClassifier) and wrapped.num_classes == 3
    # wrapping changes no module's mode
    assert wrapped.training and classifier.training and not classifier.norm.training
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([1, 2])
    assert torch.equal(wrapped(x, t), classifier(x, t) / 4)
    sampler = FDivSampler(lambda x, t: 0 * x, wrapped.eval(), shape=(1, 2, 2), divergence="js")
    assert sampler.sample(2, seeds=[1, 2], steps=3, progress=False).images.isfinite().all()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "logits hold NaN"),
        (torch.tensor([[0.0, torch.inf]]), torch.tensor([0]), r"NaN or \+inf"),
        (torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), r"labels\[0\]=1 is a masked class"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels\[1\]=3 is out of range"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "neither of them 0"),
    ],
)
def test_unusable_data_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        TemperatureScaling().fit(logits, labels)


@pytest.mark.parametrize("bounds", [(0, 1), (2, 1), (1,), "ab", (1, float("inf"))])
def test_unusable_bounds_are_named(bounds):
    with pytest.raises(ValueError, match="bounds="):
        TemperatureScaling(bounds=bounds)


def test_a_temperature_outside_the_bounds_is_named():
    with pytest.raises(ValueError, match="temperature=200"):
        TemperatureScaling(200)
