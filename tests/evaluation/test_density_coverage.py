from __future__ import annotations

import numpy as np
import pytest
import torch

from calguide_fast.evaluation import density_coverage


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_hand_made_neighbourhoods():
    # radii of the nearest neighbour: 1, 1, 0.5, 0.5
    real = line(0, 1, 10, 10.5)
    # 0.5 is in the first two balls, 0.75 too, 10.25 in the last two, 30 in none
    found = density_coverage(real, line(0.5, 0.75, 10.25, 30), k=1)
    assert found.density == 6 / 4
    assert found.coverage == 1.0
    assert density_coverage(real, line(0.5), k=1) == (2.0, 0.5)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("block", [7, 16, 4096])
def test_brute_force(k, block):
    random = np.random.RandomState(k)
    real, fake = random.randn(50, 3) + 100, 1.3 * random.randn(41, 3) + 100.5
    radius = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), axis=1)[:, k]
    inside = np.linalg.norm(fake[:, None] - real[None], axis=-1) <= radius  # [fake, real]
    found = density_coverage(real, fake, k=k, block=block)
    assert found == pytest.approx((inside.sum() / (k * 41), inside.any(0).mean()), abs=1e-12)
    assert found.density > 0 and 0 < found.coverage < 1


def test_samples_of_one_distribution_have_density_one_and_the_papers_coverage():
    # Naeem et al., lemma 2: 1 − (N−1)…(N−k) / (M+N−1)…(M+N−k)
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(1500, 4, generator=generator), torch.randn(1500, 4, generator=generator)
    found = density_coverage(real, fake)
    expected = 1 - np.prod([(1500 - i) / (3000 - i) for i in range(1, 6)])
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(expected, abs=0.02)


def test_unusable_arguments_are_named():
    with pytest.raises(ValueError, match="real has 5 samples, at least 6"):
        density_coverage(torch.zeros(5, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="k and block must be at least 1"):
        density_coverage(torch.zeros(9, 2), torch.zeros(9, 2), k=0)
