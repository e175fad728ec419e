"""Counter-based noise in plain torch: Philox4x32-10 and Box-Muller, one torch operation for every rounding.

This states what `csrc/philox.h` computes, to the last bit and on any device: image b has the key `seeds[b]`, and the
counter (element // 4, draw, stream, 0) gives elements 4j .. 4j+3 of its NCHW order their four normals. Stream 0 is the
sampler's noise (draw 0 is x_T, draw k the k-th step taken), stream 1 its labels, stream 2 what a recurrence draws
besides. The construction is frozen.

Philox is of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_STREAM = 0
LABEL_STREAM = 1
RECURRENCE_STREAM = 2

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# log(1 + t) = t - t^2 / 2 + t^3 c(t), lowest power first; sin x = x + x^3 s(x^2) and cos x = c(x^2), highest first
# fmt: off
_LOG = tuple(map(float.fromhex, ("0x1.555554p-2", "-0x1.000226p-2", "0x1.99a01cp-3", "-0x1.54728ap-3",
                                 "0x1.22d92ep-3", "-0x1.0d8242p-3", "0x1.055ec4p-3", "-0x1.38c9d4p-4")))
# fmt: on
_SIN = tuple(map(float.fromhex, ("-0x1.995408p-13", "0x1.110778p-7", "-0x1.555546p-3")))
_COS = tuple(map(float.fromhex, ("0x1.99e80cp-16", "-0x1.6c0c28p-10", "0x1.55554ap-5", "-0x1p-1", "0x1p0")))
_LOG2_HIGH, _LOG2_LOW = float.fromhex("0x1.63p-1"), float.fromhex("-0x1.bd0106p-13")
_RADIANS = float.fromhex("0x1.921fb6p-30")


def philox_words(seeds: Tensor, n_blocks: int, draw: int, stream: int) -> Tensor:
    """The four words of counters (0 .. n_blocks-1, draw, stream, 0), (B, n_blocks, 4) int64 in 0 .. 2^32-1.

    `seeds` is (B,) int64, the bit pattern of the unsigned 64-bit key.
    """
    c0 = torch.arange(n_blocks, device=seeds.device).expand(len(seeds), n_blocks)
    counter = (c0, torch.full_like(c0, draw), torch.full_like(c0, stream), torch.zeros_like(c0))
    return torch.stack(philox_4x32(counter, ((seeds & _WORD)[:, None], (seeds >> 32 & _WORD)[:, None])), -1)


def philox_4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words, int64 tensors of values in 0 .. 2^32-1, to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _wide_product(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def philox_normal(seeds: Tensor, shape: Sequence[int], draw: int, stream: int, out: Tensor | None = None) -> Tensor:
    """Standard normals of images of `shape`, channels first, (B, *shape) fp32: a function of seed, draw and stream."""
    if seeds.device.type == "mps":  # which has no float64 to take the square root in
        normals = philox_normal(seeds.cpu(), shape, draw, stream)
        return normals.to(seeds.device) if out is None else out.copy_(normals)
    elements = math.prod(shape)
    words = philox_words(seeds, -(-elements // 4), draw, stream)
    u = ((words[..., 0::2] >> 8) + 1).float() * 2.0**-24
    # torch's fp32 square root is not correctly rounded on every machine; by way of float64 it is
    radius = (_log(u) * -2.0).double().sqrt().float()
    cos, sin = _cos_sin(words[..., 1::2])
    normals = torch.stack((radius * cos, radius * sin), -1)  # [B, blocks, 2, 2]
    normals = normals.flatten(1)[:, :elements].reshape(len(seeds), *shape)
    return normals if out is None else out.copy_(normals)


def philox_integers(seeds: Tensor, high: int, stream: int) -> Tensor:
    """One integer in 0 .. high-1 per seed, (B,) int64.

    It is floor(w * high / 2^32), w the first word of counter (0, 0, stream, 0).
    Raises ValueError where `high` is not within 1 .. 2^31.
    """
    if not 1 <= high <= 2**31:
        raise ValueError(f"high must be within 1 .. 2**31, got {high}")
    return philox_words(seeds, 1, 0, stream)[:, 0, 0] * high >> 32


def _wide_product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a 64-bit product, by 16-bit halves of the multiplier: int64 would overflow."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    offset = bits - 0x3F3504F3
    n = (offset >> 23).float()
    t = (bits - (offset >> 23 << 23)).view(torch.float32) - 1.0
    square = t * t
    c01, c23, c45, c67 = (t * odd + even for even, odd in zip(_LOG[::2], _LOG[1::2], strict=True))
    c = (square * square) * (square * c67 + c45) + (square * c23 + c01)
    value = c * t * square + n * _LOG2_LOW
    return (t + (value + square * -0.5)) + n * _LOG2_HIGH


def _cos_sin(words: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles 2 pi words / 2^32, reduced to the nearest quarter turn in integers."""
    quadrant = words + 0x20000000 >> 30 & 3
    x = (words - (words + 0x20000000 >> 30 << 30)).float() * _RADIANS
    square = x * x
    sin = x + x * square * _polynomial(_SIN, square)
    cos = _polynomial(_COS, square)
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return (
        torch.where((quadrant == 1) | (quadrant == 2), -cos, cos),
        torch.where(quadrant >= 2, -sin, sin),
    )
