"""The comparison that the other tests rely on can fail."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, math.nan]),
        ([math.nan], [math.nan]),
        ([math.inf], [1.0]),
        ([1.0], [math.inf]),
        ([math.inf], [-math.inf]),
        ([1.00001], [1.0]),
        ([1e-4], [0.0]),
        ([1.0], [1.0, 1.0]),
    ],
)
def test_a_difference_fails(got, expected):
    with pytest.raises(AssertionError):
        assert_near(torch.tensor(got), torch.tensor(expected, dtype=torch.float64), 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes(dtype):
    exact = torch.tensor([1 / 3, -2 / 3, 1e-5, 1000.3, math.inf, 0.0], dtype=torch.float64)
    assert_near(exact.to(dtype), exact, 0.0)


def test_empty_passes():
    assert_near(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.float64), 0.0)
