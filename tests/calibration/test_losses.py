from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic import predictions

import calguide_fast
from calguide_fast import HuberECELoss, SmoothECELoss, huber_ece, smooth_ece
from calguide_fast.calibration import measure_calibration, top_label


def test_huber_ece_is_the_formula():
    f, a = np.array([0.9, 0.5, 1.0, 0.0]), np.array([1, 0, 0, 1])
    expected = np.mean(np.sqrt((f - a) ** 2 + 0.01))
    for outcomes in (torch.tensor(a), torch.tensor(a).bool(), torch.tensor(a).float()):
        found = huber_ece(torch.tensor(f), outcomes, beta=0.01)
        assert found.item() == pytest.approx(expected, rel=1e-14) and found.dtype == torch.float64
    assert huber_ece(torch.tensor(f).bfloat16(), torch.tensor(a), beta=0.01).dtype == torch.float32


def test_huber_ece_of_no_error_is_the_root_of_beta():
    assert huber_ece(torch.ones(5), torch.ones(5)).item() == pytest.approx(1e-3**0.5)


def test_huber_ece_pays_for_confidence_where_the_classifier_is_mostly_right():
    """What its docstring warns of: of 70 % right answers, confidence 1 costs less than confidence 0.7."""
    correct = torch.arange(10) < 7
    at = {f: huber_ece(torch.full((10,), f), correct, beta=1e-6).item() for f in (0.7, 0.85, 1.0)}
    assert at[1.0] < at[0.85] < at[0.7]
    # the smooth ECE does not
    found = {f: smooth_ece(torch.full((10,), f), correct).value.item() for f in (0.71, 0.85, 1.0)}
    assert found[0.71] < 0.011 and 0.14 < found[0.85] < found[1.0]


@pytest.mark.parametrize("loss", [HuberECELoss(beta=0.02), SmoothECELoss(), SmoothECELoss(bandwidth=0.1)], ids=str)
def test_gradients_are_finite_differences(loss):
    logits, labels = predictions(60, 3, overconfidence=2.0)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, labels), logits)
    for _ in range(3):
        direction = torch.randn_like(logits)
        step = 1e-5 * direction
        with torch.no_grad():
            difference = (loss(logits + step, labels) - loss(logits - step, labels)).item() / 2e-5
        assert (grad * direction).sum().item() == pytest.approx(difference, rel=1e-4, abs=1e-7)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [HuberECELoss(), SmoothECELoss()], ids=str)
def test_losses_stand_beside_cross_entropy_in_any_precision(loss, dtype):
    logits, labels = predictions(200, overconfidence=3.0)
    low = logits.to(dtype).requires_grad_()
    total = torch.nn.functional.cross_entropy(low.float(), labels) + loss(low, labels)
    total.backward()
    assert low.grad.dtype == dtype and low.grad.isfinite().all()
    assert loss(low, labels).item() == pytest.approx(loss(logits, labels).item(), abs=5e-3)


def test_the_smooth_loss_asks_an_overconfident_classifier_for_less_confidence():
    logits, labels = predictions(2000, overconfidence=4.0)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    SmoothECELoss()(factor * logits, labels).backward()
    assert factor.grad > 0  # descending it shrinks the logits


def test_top_label_and_measures_are_numpys():
    logits, labels = predictions(300, 5)
    confidence, correct = top_label(logits, labels.int())
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(confidence, p.max(1), rtol=1e-12)
    np.testing.assert_array_equal(correct, p.argmax(1) == labels.numpy())
    found = measure_calibration(logits, labels)
    assert found.accuracy == pytest.approx((p.argmax(1) == labels.numpy()).mean())
    assert found.confidence == pytest.approx(p.max(1).mean())
    assert found.cross_entropy == pytest.approx(-np.log(p[np.arange(300), labels.numpy()]).mean())
    assert found.smooth_ece == pytest.approx(smooth_ece(confidence, correct).value.item())
    assert found.samples == 300


@pytest.mark.parametrize(
    ("confidence", "correct", "beta", "error", "message"),
    [
        (torch.tensor([0.5, 1.5]), torch.ones(2), 1e-3, ValueError, r"confidence\[1\]=1.5 must lie in \[0, 1\]"),
        (torch.tensor([torch.nan]), torch.ones(1), 1e-3, ValueError, r"confidence\[0\]=nan"),
        (torch.tensor([0.5]), torch.tensor([2]), 1e-3, ValueError, r"correct\[0\]=2 must be 0 or 1"),
        (torch.zeros(0), torch.zeros(0), 1e-3, ValueError, "n at least 1"),
        (torch.zeros(3), torch.zeros(2), 1e-3, ValueError, r"correct has shape \(2,\); it must be \(3,\)"),
        (torch.zeros(3, 1), torch.zeros(3), 1e-3, ValueError, r"confidence has shape \(3, 1\)"),
        (torch.zeros(3).long(), torch.zeros(3), 1e-3, TypeError, "confidence has dtype torch.int64"),
        (torch.zeros(3), torch.zeros(3), 0, ValueError, "beta=0 must be greater than 0"),
        (torch.zeros(3), torch.zeros(3), "1", TypeError, "beta must be a number"),
    ],
)
def test_unusable_arguments_are_named(confidence, correct, beta, error, message):
    with pytest.raises(error, match=message):
        huber_ece(confidence, correct, beta)


@pytest.mark.parametrize("loss", [HuberECELoss(), SmoothECELoss()], ids=str)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), ValueError, r"logits has shape \(3,\)"),
        (torch.zeros(0, 4), torch.zeros(0).long(), ValueError, r"logits has shape \(0, 4\)"),
        (torch.zeros(2, 4), torch.zeros(3).long(), ValueError, "labels has shape"),
        (torch.zeros(2, 4), torch.zeros(2), TypeError, "labels has dtype torch.float32"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), ValueError, r"labels\[1\]=4 is out of range"),
    ],
)
def test_losses_name_unusable_predictions(loss, logits, labels, error, message):
    with pytest.raises(error, match=message):
        loss(logits, labels)


def test_settings_are_checked_when_they_are_given():
    with pytest.raises(ValueError, match="beta=-1 must be"):
        HuberECELoss(beta=-1)
    with pytest.raises(ValueError, match="bandwidth=0 must be"):
        SmoothECELoss(bandwidth=0)
    # a habit of losses with bins
    with pytest.raises(ValueError, match="bandwidth=15 must be between 0.001 and 1"):
        SmoothECELoss(15)


def test_the_names_are_public():
    assert {"huber_ece", "HuberECELoss", "SmoothECELoss"} <= set(calguide_fast.__all__)
