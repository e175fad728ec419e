"""Seeds: one 64-bit number for each image, from which its noise and its drawn label follow."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from calguide_fast.backends.philox import LABEL_STREAM, philox_integers


def as_seeds(seeds: Sequence[int] | Tensor | None, count: int) -> Tensor:
    """(count,) int64 on the CPU, the bit patterns of unsigned 64-bit seeds.

    Args:
        seeds: one integer in −2⁶³..2⁶⁴−1 for each image (a list, range or tensor), or None to draw them from torch's
            global generator, which ``torch.manual_seed`` fixes.

    Raises:
        ValueError: another number of seeds than images, or a seed that does not fit 64 bits.
        TypeError: not integers.
    """
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device="cpu")
    if isinstance(seeds, Tensor):
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise TypeError(f"seeds has dtype {seeds.dtype}; it must be an integer type")
        if seeds.ndim != 1:
            raise ValueError(f"seeds has shape {tuple(seeds.shape)}; it must be ({count},), one for each image")
        numbers = seeds.tolist()
    elif not isinstance(seeds, Iterable):
        raise TypeError(
            f"seeds={seeds!r} must hold one seed for each image, for example range({seeds}, {seeds + count})"
        )
    else:
        numbers = [_integer(seed) for seed in seeds]
    if len(numbers) != count:
        raise ValueError(f"seeds has {len(numbers)} entries for {count} images")
    for seed in numbers:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed {seed} does not fit 64 bits")
    patterns = [seed - 2**64 if seed >= 2**63 else seed for seed in numbers]
    return torch.tensor(patterns, dtype=torch.int64, device="cpu")


def _integer(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seeds must be integers, got {seed!r}") from None


def draw_labels(seeds: Tensor, num_classes: int) -> Tensor:
    """(B,) int64 labels, uniform over 0..num_classes−1, each from its image's own seed (a stream of its own)."""
    return philox_integers(seeds, num_classes, LABEL_STREAM)
