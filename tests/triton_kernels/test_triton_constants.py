"""The constants that Triton's smooth ECE states again are those of the header that the other kernels share."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import HAS_TRITON
from formulas import assert_near

from calguide_fast.backends import smooth_ece as plain

pytestmark = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed (it is a part of the dev extra on Linux)"
)

HEADER = (Path(__file__).parents[2] / "csrc" / "smooth_ece_math.h").read_text()
NUMBERS = {name: float(value) for name, value in re.findall(r"(\w+) = (-?[\d.]+(?:e[+-]?\d+)?)[,;]", HEADER)}
# the header's name, and where Triton's kernels and the checks before them have the same
RESTATED = {
    "pi": ["triton.cosine_series.PI"],
    "least_bandwidth": ["triton.smooth_ece_search.FLOOR", "smooth_ece.LEAST_BANDWIDTH"],
    "first_bandwidth": ["triton.smooth_ece_search.FIRST_BANDWIDTH"],
    "series_cutoff": ["triton.smooth_ece_search.CUTOFF"],
    "points_per_sigma": ["triton.smooth_ece_search.POINTS"],
    "cells_per_sigma": ["triton.smooth_ece_gradient.CELLS"],
    "rounding_share": ["triton.smooth_ece_search.ROUNDING"],
    "least_total": ["triton.smooth_ece_search.LEAST_TOTAL", "outcomes.LEAST_TOTAL"],
    "most_total": ["triton.smooth_ece_search.MOST_TOTAL", "outcomes.MOST_TOTAL"],
    "found_within": ["triton.smooth_ece_search.CLOSE"],
    "least_step_share": ["triton.smooth_ece_search.STEP_SHARE"],
    "most_steps": ["triton.smooth_ece_search.EVALUATIONS"],
}


@pytest.mark.parametrize("name", RESTATED)
def test_a_constant_is_the_headers(name):
    for place in RESTATED[name]:
        module, constant = place.rsplit(".", 1)
        restated = getattr(import_module(f"calguide_fast.backends.{module}"), constant)
        assert getattr(restated, "value", restated) == NUMBERS[name], place


def test_the_curve_is_laid_out_as_in_the_header():
    """The places that the kernels of Triton and the reference write down as 0, 1 and 2."""
    assert [NUMBERS[f"curve_{part}"] for part in ("sigma", "factor", "series")] == [0, 1, 2]
    search = import_module("calguide_fast.backends.triton.smooth_ece_search")
    assert search.CURVE_TERMS.value == plain.CURVE_LENGTH - NUMBERS["curve_series"]


def test_samples_are_shared_out_as_in_the_header(interpreted_triton):
    rows = re.search(r"share_coefficients\[4\]\[4\] = \{(.*?)\};", HEADER, re.DOTALL)[1]
    powers = torch.tensor(
        [[_quotient(term) for term in row.split(",")] for row in re.findall(r"\{([^{}]*)\}", rows)], dtype=torch.float64
    )
    backend = import_module("calguide_fast.backends.triton.smooth_ece")
    nodes = backend.NODES.value
    for offset in (-0.5, -0.3, 0.0, 0.2, 0.45):
        # one sample, at an offset from the centre of a bin in the middle
        f = torch.tensor([(8000.5 + offset) / backend.BINS.value], dtype=torch.float64)
        sums = torch.zeros(2 + backend.TABLES.value * nodes, dtype=torch.int64)
        numbers = torch.empty(2, dtype=torch.float64)
        backend._deposit_kernel[(1,)](
            f, torch.zeros(1, dtype=torch.uint8), None, None, numbers, sums, 1, 1, 0, SAMPLES=1
        )
        shares = sums[2 + 7999 : 2 + 8003] * numbers[1] / f
        assert_near(shares, torch.tensor([offset**power for power in range(4)]).double() @ powers, 1e-12)


def _quotient(text: str) -> float:
    numerator, denominator = text.split("/")
    return ast.literal_eval(numerator.strip()) / ast.literal_eval(denominator.strip())
