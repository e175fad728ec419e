"""sampling_noise: Gaussian noise that depends on nothing but each image's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from calguide_fast import backends
from calguide_fast.ops import checks
from calguide_fast.ops._library import LIBRARY, is_direct

LIBRARY.define("sampling_noise(Tensor seeds, SymInt[] shape, int draw, int stream) -> Tensor")


def sampling_noise(
    seeds: Tensor, shape: tuple[int, ...], draw: int, stream: int = 0, out: Tensor | None = None
) -> Tensor:
    """Standard normals that depend on nothing but each image's seed: the same bits on every backend and batch size.

    Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter = (NCHW element / 4, draw, stream, 0), then
    Box-Muller.

    Args:
        seeds: (B,) int64, the bit patterns of unsigned 64-bit seeds.
        shape: of one image, (C, *spatial).
        draw: 0 for x_T, then 1, 2, … for the steps in order of use; below 2³².
        stream: 0 for sampling noise.
        out: (B, *shape) float32, contiguous, on the device of the seeds; written and returned if given.

    Returns:
        (B, *shape) float32.

    Raises:
        TypeError: seeds of another dtype or shape; out of another dtype.
        ValueError: draw or stream out of range; out of another shape or device, or not contiguous.
    """
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise TypeError("seeds must be a (B,) int64 tensor")
    for name, value in (("draw", draw), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must lie in 0..{2**32 - 1}")
    if out is not None:
        _check_out(out, seeds, shape)
    if is_direct(seeds, out):
        return backends.choose(seeds).philox_normal(seeds, tuple(shape), draw, stream, out)
    noise = torch.ops.calguide_fast.sampling_noise(seeds, tuple(shape), draw, stream)
    return noise if out is None else out.copy_(noise)


def _check_out(out: Tensor, seeds: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(out, Tensor) or out.dtype != torch.float32:
        raise TypeError("out must be a float32 tensor")
    checks.shaped("out", out, (len(seeds), *shape))
    checks.same_device("out", out, "seeds", seeds)
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


@torch.library.impl(LIBRARY, "sampling_noise", "CompositeExplicitAutograd")
def _sampling_noise_impl(seeds: Tensor, shape: list[int], draw: int, stream: int) -> Tensor:
    return backends.choose(seeds).philox_normal(seeds, tuple(shape), draw, stream)


@torch.library.register_fake("calguide_fast::sampling_noise", lib=LIBRARY)
def _sampling_noise_fake(seeds: Tensor, shape: list[int], draw: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)
