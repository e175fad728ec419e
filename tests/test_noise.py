"""Seeds and what follows from them: the same bits everywhere, and normal."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calguide_fast import use_backend
from calguide_fast.noise import as_seeds, draw_labels
from calguide_fast.ops.noise import sampling_noise

SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])


@pytest.fixture
def seeds(backend) -> torch.Tensor:
    """On the backend's device."""
    return SEEDS.to(torch.get_default_device())


def test_noise_is_the_same_on_every_backend():
    for shape, draw in (((3, 16, 16), 0), ((1, 5), 3), ((7,), 1000), ((3, 1, 1), 2**32 - 1)):
        with use_backend("reference"):
            expected = sampling_noise(SEEDS, shape, draw)
        with use_backend("cpu"):
            assert torch.equal(sampling_noise(SEEDS, shape, draw), expected)


def test_noise_and_labels_are_frozen(backend):
    """Samples are named by their seeds: no version may change what a seed draws."""
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345])
    draws = torch.stack([sampling_noise(seeds, (3, 32, 32), draw) for draw in (0, 1, 250)])
    first = [float.fromhex(z) for z in ("0x1.fb7662p-1", "-0x1.d96d6p-1", "-0x1.3c373cp-1", "-0x1.eda362p-2")]
    assert draws[0, 0].flatten()[:4].tolist() == first
    digest = hashlib.sha256(draws.cpu().numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "60399fa5cf9f6e0825bc6a692a7776043362503ae4acacd1605919251a624557"
    assert draw_labels(torch.arange(12), 1000).tolist() == [516, 27, 830, 204, 997, 387, 887, 495, 384, 634, 242, 768]


def test_noise_depends_on_the_seed_alone(backend, seeds):
    together = sampling_noise(seeds, (3, 5, 7), 4)
    for b in range(len(seeds)):
        assert torch.equal(sampling_noise(seeds[b : b + 1], (3, 5, 7), 4)[0], together[b])
    assert torch.equal(sampling_noise(seeds.flip(0), (3, 5, 7), 4), together.flip(0))
    assert torch.equal(sampling_noise(torch.stack([seeds, seeds], 1)[:, 1], (3, 5, 7), 4), together)


def test_noise_is_written_where_it_is_wanted(backend, seeds):
    expected = sampling_noise(seeds, (3, 5, 7), 4, 1)
    out = torch.full_like(expected, torch.nan)
    assert sampling_noise(seeds, (3, 5, 7), 4, 1, out=out) is out and torch.equal(out, expected)
    with FlopCounterMode(display=False):
        # a dispatch mode, under which the op itself is called
        assert sampling_noise(seeds, (3, 5, 7), 4, 2, out=out) is out and not torch.equal(out, expected)
    for wrong, error, said in (
        (out.double(), TypeError, "out must be a float32"),
        (out[1:], ValueError, "out has shape"),
        (out.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "out must be contiguous"),
    ):
        with pytest.raises(error, match=said):
            sampling_noise(seeds, (3, 5, 7), 4, out=wrong)


def test_noise_counts_elements_in_order(backend, seeds):
    """A larger image begins with the smaller one's numbers, as the counter is the element's index."""
    assert torch.equal(sampling_noise(seeds, (10,), 0), sampling_noise(seeds, (3, 20), 0).flatten(1)[:, :10])


def test_every_coordinate_of_the_counter_matters(backend, seeds):
    base = sampling_noise(seeds, (64,), 1)
    for other in (
        sampling_noise(seeds + 1, (64,), 1),
        sampling_noise(seeds, (64,), 2),
        sampling_noise(seeds, (64,), 1, 2),
    ):
        assert (other != base).float().mean() > 0.99
    # the key has 64 bits: seeds that differ in the upper half only
    assert not torch.equal(sampling_noise(seeds[:1], (8,), 0), sampling_noise(seeds[:1] + 2**32, (8,), 0))


def test_noise_is_standard_normal(backend):
    z = sampling_noise(torch.arange(64), (1 << 12,), 0).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # neighbours, and the two halves of a Box-Muller pair, are uncorrelated
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / math.sqrt(n)
    sorted_z = z.flatten().sort().values
    gap = (torch.special.ndtr(sorted_z) - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.95 / math.sqrt(n), "Kolmogorov-Smirnov at one in a thousand"


def test_first_normals_are_frozen():
    """Of seed 0, draw 0: from Philox's published words 6627e8d5 e169c58d bc57ac4c 9b00dbd8, by Box and Muller."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = []
    for r, angle in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log(((r >> 8) + 1) * 2.0**-24))
        turn = 2 * math.pi * angle / 2**32
        expected += [radius * math.cos(turn), radius * math.sin(turn)]
    assert sampling_noise(torch.tensor([0]), (4,), 0)[0].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_small_shapes(shape, backend, seeds):
    assert sampling_noise(seeds, shape, 0).shape == (6, *shape)
    assert sampling_noise(seeds[:0], (3, 4), 0).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], (3,), 0), TypeError, r"seeds must be a \(B,\) int64 tensor"),
        ((SEEDS.int(), (3,), 0), TypeError, r"seeds must be a \(B,\) int64 tensor"),
        ((SEEDS[None], (3,), 0), TypeError, r"seeds must be a \(B,\) int64 tensor"),
        ((SEEDS, (3,), -1), ValueError, r"draw=-1 must lie in 0\.\.4294967295"),
        ((SEEDS, (3,), 2**32), ValueError, "draw=4294967296 must lie in"),
        ((SEEDS, (3,), 0, -1), ValueError, "stream=-1 must lie in"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sampling_noise(*arguments)


def test_seeds_are_64_bit_patterns():
    given = [0, 5, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]
    patterns = [0, 5, 2**63 - 1, -(2**63), -1, -1, -(2**63)]
    for seeds in (given, tuple(given), np.array(given, dtype=object)):
        assert as_seeds(seeds, 7).tolist() == patterns
    assert as_seeds(range(3), 3).tolist() == [0, 1, 2]
    assert as_seeds(np.arange(3), 3).tolist() == [0, 1, 2]
    assert as_seeds(torch.arange(3, dtype=torch.int32), 3).tolist() == [0, 1, 2]
    assert as_seeds(torch.tensor([2**64 - 1], dtype=torch.uint64), 1).tolist() == [-1]


def test_seeds_that_are_drawn_follow_torch():
    torch.manual_seed(3)
    first = as_seeds(None, 1000)
    torch.manual_seed(3)
    assert torch.equal(as_seeds(None, 1000), first)
    assert len(first.unique()) == 1000 and first.dtype == torch.int64 and (first < 0).any()


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        ([1, 2], ValueError, "seeds has 2 entries for 3 images"),
        ([1, 2, 2**64], ValueError, "seed 18446744073709551616 does not fit 64 bits"),
        ([1, 2, -(2**63) - 1], ValueError, "does not fit 64 bits"),
        (7, TypeError, r"seeds=7 must hold one seed for each image, for example range\(7, 10\)"),
        (torch.zeros(3), TypeError, "seeds has dtype torch.float32; it must be an integer type"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "seeds has dtype torch.bool"),
        ([1, 2, 3.5], TypeError, "seeds.*3.5"),
        (["1", "2", "3"], TypeError, "seeds.*'1'"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"seeds has shape \(3, 1\)"),
    ],
    ids=str,
)
def test_wrong_seeds(seeds, error, message):
    with pytest.raises(error, match=message):
        as_seeds(seeds, 3)


def test_labels_are_uniform_and_belong_to_the_seed():
    seeds = torch.arange(20000)
    labels = draw_labels(seeds, 10)
    assert labels.dtype == torch.int64 and labels.min() == 0 and labels.max() == 9
    counts = labels.bincount()
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9, "chi-squared with 9 degrees of freedom at one in a thousand"
    assert torch.equal(draw_labels(seeds.flip(0)[:7], 10), labels.flip(0)[:7])
    assert (draw_labels(seeds, 1) == 0).all()
