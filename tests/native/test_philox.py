"""The noise: known answers, the same bits in C++ and in torch, and normals that are normal."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from calguide_fast import _cpu
from calguide_fast.backends import cpu, philox

SEEDS = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])

# of the Random123 library: counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(x):
    return x.view(torch.int32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    result = philox.philox_4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(r) for r in result) == words


def test_words_take_the_key_from_both_halves_of_the_seed():
    key = torch.tensor(0x12345678), torch.tensor(0x9ABCDEF0)
    seed = torch.tensor([0x9ABCDEF012345678 - 2**64])
    expected = torch.stack(philox.philox_4x32([torch.tensor(v) for v in (2, 7, 3, 0)], key))
    assert torch.equal(philox.philox_words(seed, 3, draw=7, stream=3)[0, 2], expected)


@pytest.mark.parametrize("draw", [0, 1, 1000])
def test_native_bits_are_those_of_torch(draw):
    shape = (3, 300, 301)
    expected = philox.philox_normal(SEEDS, shape, draw, 0)
    assert expected.numel() >= 2**20
    assert torch.equal(bits(cpu.philox_normal(SEEDS, shape, draw, 0)), bits(expected))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 1, 1023), (2, 1, 513), (1,)])
@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
def test_native_bits_at_odd_sizes(shape, stream):
    assert torch.equal(
        bits(cpu.philox_normal(SEEDS, shape, 3, stream)), bits(philox.philox_normal(SEEDS, shape, 3, stream))
    )


def test_every_instruction_set_draws_the_same_bits(tmp_path):
    program = (
        "import sys, torch; from calguide_fast import _cpu; from calguide_fast.backends import cpu; "
        "assert _cpu.isa() == sys.argv[1]; "
        "torch.save(cpu.philox_normal(torch.tensor([5, -6]), (3, 129, 127), 4, 0), sys.argv[2])"
    )
    drawn = []
    for isa in _cpu.isas():
        path = tmp_path / f"{isa}.pt"
        environment = {**os.environ, "CALGUIDE_CPU_ISA": isa}
        subprocess.run([sys.executable, "-c", program, isa, str(path)], env=environment, check=True)
        drawn.append(torch.load(path))
    expected = philox.philox_normal(torch.tensor([5, -6]), (3, 129, 127), 4, 0)
    assert all(torch.equal(bits(normals), bits(expected)) for normals in drawn)


def test_noise_depends_on_the_seed_alone_not_on_batch_or_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([cpu.philox_normal(seed[None], (3, 200, 200), 2, 0) for seed in SEEDS])
        torch.set_num_threads(2)
        assert torch.equal(bits(cpu.philox_normal(SEEDS, (3, 200, 200), 2, 0)), bits(alone))
    finally:
        torch.set_num_threads(threads)


def test_streams_draws_and_seeds_are_distinct():
    first = cpu.philox_normal(SEEDS, (4096,), 0, 0)
    others = [cpu.philox_normal(SEEDS, (4096,), 1, 0), cpu.philox_normal(SEEDS, (4096,), 0, 1), first.roll(1, 0)]
    for other in others:
        assert (first * other).mean().abs() < 4 / math.sqrt(first.numel())


def test_against_float64():
    words = philox.philox_words(SEEDS, 1 << 16, 5, 0).double()
    u = ((words[..., 0::2] / 256).floor() + 1) * 2.0**-24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * words[..., 1::2] / 2**32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
    error = (cpu.philox_normal(SEEDS, (1 << 18,), 5, 0).double() - expected).abs()
    assert error.max() < 6e-7
    # four units in the last place
    assert (error <= 4 * 2.0**-23 * expected.abs()).all()


def test_logarithm():
    n = torch.cat([torch.arange(1, 2**17), torch.arange(2**17, 2**24, 61), torch.arange(2**24 - 2**17, 2**24 + 1)])
    u = n.float() * 2.0**-24
    expected = u.double().log()
    error = (philox._log(u).double() - expected).abs()
    assert (error <= 1.2e-7 * expected.abs()).all()


def test_normals_are_normal():
    z = cpu.philox_normal(torch.arange(16), (1 << 18,), 0, 0).flatten().double()
    n = z.numel()
    assert z.mean().abs() < 4 / math.sqrt(n)
    assert (z.var() - 1).abs() < 4 * math.sqrt(2 / n)
    assert (z**3).mean().abs() < 4 * math.sqrt(15 / n)
    assert ((z**4).mean() - 3).abs() < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov at a level of 1e-4
    normal_cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    step = torch.arange(n + 1).double() / n
    distance = torch.maximum((normal_cdf - step[:-1]).abs().max(), (normal_cdf - step[1:]).abs().max())
    assert distance < 2.23 / math.sqrt(n)
    # neighbours in a block come of one pair of words, and must not know of one another
    for lag in (1, 2, 3, 4):
        assert (z[:-lag] * z[lag:]).mean().abs() < 4 / math.sqrt(n)


def test_integers_are_uniform_and_within_range():
    seeds = torch.arange(100_000) * 2654435761 - 2**40
    drawn = philox.philox_integers(seeds, 10, philox.LABEL_STREAM)
    counts = drawn.bincount(minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 35
    word = philox.philox_words(seeds[:5], 1, 0, philox.LABEL_STREAM)[:, 0, 0].tolist()
    assert philox.philox_integers(seeds[:5], 1000, philox.LABEL_STREAM).tolist() == [w * 1000 // 2**32 for w in word]
    assert (philox.philox_integers(seeds[:5], 1, philox.LABEL_STREAM) == 0).all()
    for high in (0, -3, 2**31 + 1):
        with pytest.raises(ValueError, match="high"):
            philox.philox_integers(seeds[:5], high, philox.LABEL_STREAM)


def test_empty_batch_and_strided_seeds():
    assert cpu.philox_normal(torch.empty(0, dtype=torch.int64), (3, 8, 8), 0, 0).shape == (0, 3, 8, 8)
    assert philox.philox_normal(torch.empty(0, dtype=torch.int64), (3, 8, 8), 0, 0).shape == (0, 3, 8, 8)
    every_second = torch.arange(8)[::2]
    assert torch.equal(
        cpu.philox_normal(every_second, (7,), 0, 0), cpu.philox_normal(every_second.contiguous(), (7,), 0, 0)
    )
