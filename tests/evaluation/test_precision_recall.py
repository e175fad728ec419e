from __future__ import annotations

import numpy as np
import pytest
import torch

from calguide_fast.evaluation import precision_recall


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_hand_made_manifolds():
    # radii of the nearest neighbour: real 1, 1, 0.5, 0.5 and fake 0.25, 0.25, 8.5, 8.5
    real = line(0, 1, 10, 10.5)
    fake = line(0.5, 0.75, 13, 21.5)
    # fake 0.5 and 0.75 are within 1 of a real one; of the real ones only 0 is beyond the reach of every fake one
    found = precision_recall(real, fake, k=1)
    assert found.precision == 0.5
    assert found.recall == 0.75


def test_collapse_costs_recall_and_noise_costs_precision():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 4, generator=generator)
    collapsed = precision_recall(real, real[:1] + 1e-3 * torch.randn(300, 4, generator=generator))
    assert collapsed.precision == 1 and collapsed.recall < 0.02
    wide = precision_recall(real, 20 * torch.randn(300, 4, generator=generator))
    assert wide.precision < 0.1 and wide.recall > 0.9


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("block", [7, 16, 4096])
def test_brute_force(k, block):
    random = np.random.RandomState(k)
    real, fake = random.randn(50, 3) + 100, 1.3 * random.randn(41, 3) + 101.5

    def inside(points, centres):
        radius = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=-1), axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radius).any(1).mean()

    found = precision_recall(real, fake, k=k, block=block)
    assert found == pytest.approx((inside(fake, real), inside(real, fake)), abs=1e-12)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_equal_points_count_as_inside_even_when_every_radius_is_zero():
    real = (torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) * 1e3).repeat(5, 1)
    assert precision_recall(real, real.flip(0), k=3) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), 3, "real has 3 samples, at least 4"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 3, "real has 2 features and fake has 3"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, "k and block must be at least 1, got k=0"),
    ],
)
def test_unusable_arguments_are_named(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, fake, k=k)
