"""Statistics and scores that come in batches are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calguide_fast.evaluation import StreamingInceptionScore, StreamingStatistics, feature_statistics, inception_score


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_statistics_of_batches_are_numpys_of_the_whole(batch):
    # far from the origin: sums of squares would lose ten digits here
    table = np.random.RandomState(batch).randn(130, 6) * [0.1, 1, 2, 3, 4, 100] + 1e5
    streaming = StreamingStatistics()
    for start in range(0, len(table), batch):
        streaming.update(table[start : start + batch])
    found, whole = streaming.result(), feature_statistics(table)
    assert streaming.count == 130 and streaming.width == 6
    np.testing.assert_allclose(found.mu, table.mean(0), rtol=1e-14)
    spread = np.outer(table.std(0), table.std(0))
    for sigma in (found.sigma.numpy(), whole.sigma.numpy()):
        np.testing.assert_allclose(sigma / spread, np.cov(table, rowvar=False) / spread, rtol=0, atol=1e-9)


def test_half_precision_features_are_summed_in_double():
    table = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    found = StreamingStatistics().update(table[:1]).update(table[1:]).result()
    np.testing.assert_allclose(found.sigma, np.cov(table.double().numpy(), rowvar=False), rtol=1e-10)


def literal_inception_score(logits: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(logits), split):
        part = np.exp(logits[start : start + split])
        part = part / part.sum(1, keepdims=True)
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores))


@pytest.mark.parametrize("batch", [1, 13, 40, 1000])
@pytest.mark.parametrize("split", [9, 40, 10_000])
def test_inception_score_of_batches_is_the_literal_one(batch, split):
    # 100 samples leave a last split of 1 or 20, which counts as a whole one
    logits = 3 * np.random.RandomState(0).randn(100, 12)
    streaming = StreamingInceptionScore(split)
    for start in range(0, len(logits), batch):
        streaming.update(torch.from_numpy(logits[start : start + batch]))
    assert streaming.result() == pytest.approx(literal_inception_score(logits, split), rel=1e-12)


def test_inception_scores_bounds():
    sure = torch.eye(8) * 1e4  # the other classes' probabilities are zero in any precision
    assert inception_score(sure.repeat(5, 1)) == pytest.approx(8, rel=1e-12)
    assert inception_score(sure[:1].repeat(5, 1)) == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.zeros(9, 8)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: StreamingStatistics().result(), "statistics of 0 samples"),
        (lambda: StreamingStatistics().update(torch.zeros(1, 2)).result(), "statistics of 1 samples"),
        (lambda: StreamingStatistics().update(torch.zeros(1, 2)).update(torch.zeros(1, 3)), "has 3 features"),
        (lambda: StreamingStatistics().update(torch.tensor([[torch.nan]])), "features holds NaN"),
        (lambda: StreamingInceptionScore().result(), "Inception score of 0 samples"),
        (lambda: StreamingInceptionScore(0), "split_size must be at least 1, got 0"),
        (lambda: inception_score(torch.zeros(3)), "logits must have shape"),
    ],
)
def test_unusable_batches_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
