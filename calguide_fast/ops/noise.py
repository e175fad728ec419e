"""sampling_noise: Gaussian noise that depends on nothing but each image's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from calguide_fast import backends
from calguide_fast.ops._library import LIBRARY, is_direct

LIBRARY.define("sampling_noise(Tensor seeds, SymInt[] shape, int draw, int stream) -> Tensor")


def sampling_noise(seeds: Tensor, shape: tuple[int, ...], draw: int, stream: int = 0) -> Tensor:
    """Standard normals that depend on nothing but each image's seed: the same bits on every backend and batch size.

    Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter = (NCHW element / 4, draw, stream, 0), then
    Box-Muller.

    Args:
        seeds: (B,) int64, the bit patterns of unsigned 64-bit seeds.
        shape: of one image, (C, *spatial).
        draw: 0 for x_T, then 1, 2, … for the steps in order of use; below 2³².
        stream: 0 for sampling noise.

    Returns:
        (B, *shape) float32.

    Raises:
        TypeError: seeds of another dtype or shape.
        ValueError: draw or stream out of range.
    """
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise TypeError("seeds must be a (B,) int64 tensor")
    for name, value in (("draw", draw), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must lie in 0..{2**32 - 1}")
    if is_direct(seeds):
        return backends.choose(seeds).philox_normal(seeds, tuple(shape), draw, stream)
    return torch.ops.calguide_fast.sampling_noise(seeds, tuple(shape), draw, stream)


@torch.library.impl(LIBRARY, "sampling_noise", "CompositeExplicitAutograd")
def _sampling_noise_impl(seeds: Tensor, shape: list[int], draw: int, stream: int) -> Tensor:
    return backends.choose(seeds).philox_normal(seeds, tuple(shape), draw, stream)


@torch.library.register_fake("calguide_fast::sampling_noise", lib=LIBRARY)
def _sampling_noise_fake(seeds: Tensor, shape: list[int], draw: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)
