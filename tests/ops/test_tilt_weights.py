"""tilt_weights against its definition: the gradient of the tilted objective."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near

from calguide_fast import tilt_weights


def literal_weights(scores: torch.Tensor, tilt: float) -> torch.Tensor:
    """The gradient of (1/t) log mean exp(t s), times B."""
    scores = scores.double().requires_grad_()
    objective = (tilt * scores).exp().mean().log() / tilt
    return torch.autograd.grad(objective, scores)[0] * len(scores)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 199, 4096])
@pytest.mark.parametrize("tilt", [-0.2, 0.7, 3.0])
def test_weights_are_the_gradient_of_the_tilted_objective(count, tilt, backend):
    scores = torch.randn(count) * 2
    weights = tilt_weights(scores, tilt)
    assert weights.dtype == torch.float32 and weights.shape == (count,)
    assert_near(weights, literal_weights(scores, tilt), 5e-6)
    assert_near(weights.mean(), torch.tensor(1.0, dtype=torch.float64), 5e-6)


def test_no_tilt_is_plain_guidance(backend):
    assert torch.equal(tilt_weights(torch.randn(8), 0.0), torch.ones(8))
    assert_near(tilt_weights(torch.randn(8), 1e-6), torch.ones(8, dtype=torch.float64), 1e-5)


def test_sum_gives_the_papers_weights(backend):
    scores = torch.randn(9)
    weights = tilt_weights(scores, -0.4, "sum")
    assert_near(weights, literal_weights(scores, -0.4) / 9, 1e-6)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_sign_of_the_tilt(backend):
    scores = torch.tensor([-3.0, -1.0, -0.1])
    assert (tilt_weights(scores, 1.0).diff() > 0).all()
    assert (tilt_weights(scores, -1.0).diff() < 0).all()


def test_clip_does_not_renormalise(backend):
    scores = torch.tensor([0.0, 0.0, 5.0])
    free, clipped = tilt_weights(scores, 1.0), tilt_weights(scores, 1.0, max_weight=1.5)
    assert torch.equal(clipped, free.clamp(max=1.5))
    assert clipped[2] == 1.5
    assert (tilt_weights(scores, 1.0, max_weight=0.0) == 0).all()


@pytest.mark.parametrize("scores", [[-800.0, 0.0, 1.0], [-1e30, 0.0, 1e30], [-math.inf, 0.0, 1.0]])
def test_wide_scores_stay_finite(scores, backend):
    weights = tilt_weights(torch.tensor(scores), 1.0)
    assert_near(weights, 3 * torch.tensor(scores, dtype=torch.float64).softmax(0), 1e-6)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_nan_is_not_laundered(clip, backend):
    assert tilt_weights(torch.tensor([0.0, math.nan, 1.0]), 1.0, max_weight=clip).isnan().all()


def test_empty_strided_and_half_precision_scores(backend):
    assert tilt_weights(torch.empty(0), 1.0).shape == (0,)
    scores = torch.randn(10, 3)
    assert torch.equal(tilt_weights(scores[:, 1], 0.5), tilt_weights(scores[:, 1].contiguous(), 0.5))
    for dtype in (torch.bfloat16, torch.float16):
        half = scores[:, 0].to(dtype)
        assert torch.equal(tilt_weights(half, 0.5), tilt_weights(half.float(), 0.5))


def test_float64_stays_float64():
    scores = torch.randn(5, dtype=torch.float64)
    assert_near(tilt_weights(scores, 0.3), literal_weights(scores, 0.3), 1e-14)
    assert tilt_weights(scores, 0.3).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 1.0), TypeError, "scores must be a torch.Tensor, got list"),
        ((torch.arange(3), 1.0), TypeError, "scores has dtype torch.int64"),
        ((torch.zeros(2, 2), 1.0), ValueError, r"scores has shape \(2, 2\)"),
        ((torch.zeros(2), math.nan), ValueError, "tilt=nan must be finite"),
        ((torch.zeros(2), "1"), TypeError, "tilt must be a number, got '1'"),
        ((torch.zeros(2), 1.0, "max"), ValueError, "normalize='max' must be 'mean' or 'sum'"),
        ((torch.zeros(2), 1.0, "mean", -1.0), ValueError, "max_weight=-1.0 must be finite and at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        tilt_weights(*arguments)
