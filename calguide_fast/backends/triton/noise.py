"""Counter-based noise: Philox4x32-10 and Box-Muller, bit for bit what `csrc/philox.h` draws.

Every multiply and add must round by itself, so a kernel that draws noise is launched with UNFUSED. The construction is
frozen; its constants are explained in `calguide_fast/backends/philox.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.triton.launch import device_of, tile_shape

UNFUSED = {"enable_fp_fusion": False}

# elements in a program: 8 for each of 128 threads, so that loads and stores are of 16 bytes
TILE = 1024


@triton.jit
def _log(u):
    """Natural logarithm of u in (0, 1]: u = 2^n (1 + t) with 1 + t in [sqrt(1/2), sqrt(2))."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    n = exponent.to(tl.float32)
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = t * t
    c01 = t * -0.2500082 + 0.3333333
    c23 = t * -0.16623409 + 0.20001242
    c45 = t * -0.1315961 + 0.1420158
    c67 = t * -0.07636435 + 0.12762216
    c = (square * square) * (square * c67 + c45) + (square * c23 + c01)
    # log(2) in two parts, the first short enough for an exact product
    value = c * t * square + n * -0.00021219444
    return (t + (value + square * -0.5)) + n * 0.693359375


@triton.jit
def _normal_pair(radius_word, angle_word):
    """Two normals by Box-Muller: the radius by the upper 24 bits of one word, the angle 2 pi word / 2^32 by another."""
    u = ((radius_word >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(_log(u) * -2.0)

    # half a quarter turn further, the upper two bits are the nearest quadrant; the rest of the angle is within pi / 4
    turned = angle_word + 0x20000000
    rest = ((turned & 0x3FFFFFFF) - 0x20000000).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629181e-09
    square = x * x
    s = x + (x * square) * ((square * -0.00019518292 + 0.008332189) * square + -0.16666655)
    c = (((square * 2.4432327e-05 + -0.001388731) * square + 0.041666646) * square + -0.5) * square + 1.0

    # an odd quadrant swaps the two; sine is negative in the upper half turn, cosine in the middle one
    quadrant = turned >> 30
    odd = (quadrant & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return radius * cos, radius * sin


@triton.jit
def normals(seed, first, draw, stream, IMAGES: tl.constexpr, BLOCK: tl.constexpr):
    """Elements first .. first + BLOCK - 1, both multiples of 4, of the images with these seeds [IMAGES, 1]."""
    block = tl.zeros([IMAGES, BLOCK // 4], tl.uint32) + (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    zero = block * 0
    r0, r1, r2, r3 = tl.philox(seed, block, zero + draw, zero + stream, zero)
    z0, z1 = _normal_pair(r0, r1)
    z2, z3 = _normal_pair(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["batch", "draw", "stream"])
def _normal_kernel(seeds, out, batch, elements, draw, stream, IMAGES: tl.constexpr, BLOCK: tl.constexpr):
    tiles = tl.cdiv(elements, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    seed = tl.load(seeds + image, mask=image < batch, other=0)[:, None]
    z = normals(seed, first, draw.to(tl.uint32), stream.to(tl.uint32), IMAGES, BLOCK)
    element = first + tl.arange(0, BLOCK)
    mask = (image < batch)[:, None] & (element < elements)[None, :]
    tl.store(out + image[:, None] * elements + element[None, :], z, mask=mask)


def philox_normal(seeds: Tensor, shape: Sequence[int], draw: int, stream: int, out: Tensor | None = None) -> Tensor:
    """Standard normals of images of `shape`, (B, *shape) fp32: a function of seed, draw and stream alone.

    `out` is contiguous.
    """
    seeds = seeds.contiguous()
    batch, elements = len(seeds), math.prod(shape)
    out = torch.empty((batch, *shape), dtype=torch.float32, device=seeds.device) if out is None else out
    if out.numel():
        images, block = tile_shape(elements, TILE, TILE)
        grid = (triton.cdiv(batch, images) * triton.cdiv(elements, block),)
        with device_of(seeds):
            _normal_kernel[grid](seeds, out, batch, elements, draw, stream, IMAGES=images, BLOCK=block, **UNFUSED)
    return out
