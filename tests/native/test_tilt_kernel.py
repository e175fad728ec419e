"""Tilt weights of the CPU backend."""

from __future__ import annotations

import math

import pytest
import torch

from calguide_fast.backends import cpu


def weights(scores, tilt, normalize_sum=False, max_weight=math.inf):
    return cpu.tilt_weights(scores, tilt, normalize_sum, max_weight)


@pytest.mark.parametrize("tilt", [-0.2, 0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_is_a_softmax(tilt, count):
    scores = 5 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    expected = torch.softmax(tilt * scores.double(), 0)
    assert torch.allclose(weights(scores, tilt, normalize_sum=True).double(), expected, rtol=1e-6, atol=1e-37)
    mean = weights(scores, tilt)
    assert torch.allclose(mean.double(), count * expected, rtol=1e-6, atol=1e-37)
    assert mean.double().mean() == pytest.approx(1.0, abs=1e-6)


def test_clips_without_renormalising():
    scores = torch.tensor([0.0, 1.0, 5.0])
    free = weights(scores, 1.0)
    assert torch.equal(weights(scores, 1.0, max_weight=1.5), free.clamp(max=1.5))
    assert torch.equal(weights(scores, 1.0, normalize_sum=True, max_weight=0.5), (free / 3).clamp(max=0.5))


def test_reads_strided_scores():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights(scores[::3], 0.7), weights(scores[::3].contiguous(), 0.7))


def test_extremes():
    assert weights(torch.empty(0), 1.0).shape == (0,)
    assert weights(torch.tensor([0.0, math.nan]), 1.0, max_weight=1.0).isnan().all()
    # a masked label's score: no weight
    assert torch.equal(weights(torch.tensor([0.0, -math.inf]), 2.0), torch.tensor([2.0, 0.0]))
    assert weights(torch.tensor([-math.inf, -math.inf]), 1.0).isnan().all()
    assert torch.equal(weights(torch.tensor([1e30, -1e30]), 1.0), torch.tensor([2.0, 0.0]))
