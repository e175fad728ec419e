"""A class far ahead of all others, the label or a wrong one, against 100-digit decimals: autograd cancels there."""

from __future__ import annotations

import pytest
import torch
from exact import exact_gradient
from formulas import NAMES, assert_near, literal

from calguide_fast import guidance_gradient

ALL = [*NAMES, "alpha:4"]
KL_FAMILY = ("none", "reverse_kl", "forward_kl", "jeffreys")
LABEL, TOP = 2, 5
# relative to max(1, |·|), as for every float32 result
TOLERANCE = 5e-6


def ahead(gap: float, num_classes: int, top: int = TOP) -> torch.Tensor:
    """A row of few distinct logits with one class `gap` nats above the next."""
    row = (torch.randn(num_classes) * 2).round() / 2
    row[top] = row.max() + gap
    return row


@pytest.mark.parametrize("divergence", ALL)
def test_decimals_agree_with_autograd_where_nothing_cancels(divergence):
    row = ahead(1.0, 12)
    expected = literal(row[None], torch.tensor([LABEL]), divergence=divergence)
    grad, value = exact_gradient(row, LABEL, divergence)
    assert_near(expected.grad[0], grad, 1e-13)
    assert_near(expected.divergence[0], value, 1e-13)


@pytest.mark.parametrize("num_classes", [10, 1000, 21843])
@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("divergence", ALL)
def test_wrong_class_far_ahead(divergence, gap, num_classes, backend):
    row = ahead(gap, num_classes)
    grad, value = exact_gradient(row, LABEL, divergence)
    found = guidance_gradient(row[None], torch.tensor([LABEL]), divergence)
    assert_near(found.grad[0], grad, TOLERANCE)
    assert_near(found.divergence[0], value, TOLERANCE)


@pytest.mark.parametrize("num_classes", [10, 1000, 21843])
@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("top", [LABEL, TOP])
@pytest.mark.parametrize("divergence", ALL)
def test_float64(divergence, top, gap, num_classes):
    row = ahead(gap, num_classes, top).double()
    grad, value = exact_gradient(row, LABEL, divergence)
    found = guidance_gradient(row[None], torch.tensor([LABEL]), divergence)
    assert_near(found.grad[0], grad, 1e-11)
    assert_near(found.divergence[0], value, 1e-11)


@pytest.mark.parametrize("num_classes", [10, 1000, 21843])
@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("divergence", [name for name in ALL if name not in KL_FAMILY])
def test_what_is_left_of_the_likeliest_class_keeps_its_digits(divergence, gap, num_classes, backend):
    # without the temperatures' terms nothing hides it
    settings = {"joint_temperature": 0.0, "marginal_temperature": 0.0}
    row = ahead(gap, num_classes)
    expected = exact_gradient(row, LABEL, divergence, **settings)[0][TOP].item()
    found = guidance_gradient(row[None], torch.tensor([LABEL]), divergence, **settings).grad[0, TOP].item()
    assert found == pytest.approx(expected, rel=1e-5, abs=0.0)
