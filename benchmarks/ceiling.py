"""The bandwidth that this machine reaches when it does nothing but copy, at the size in question."""

from __future__ import annotations

import functools

import torch
from timing import BLOCKS, clock_of

# below this, what is around a copy is more than the copy
SMALLEST = 1 << 17
# that each size is copied for
SECONDS = 0.1


def bandwidth(traffic: int, device: torch.device) -> float | None:
    """Bytes per second, read and written, of a copy that moves at least so many bytes; None below the smallest.

    Sizes are rounded up to a power of two: what fits a cache is compared with a copy in that cache.
    """
    return None if traffic < SMALLEST else _copying(1 << (traffic - 1).bit_length(), device, torch.get_num_threads())


# threads: a key, as the copy's speed depends on them
@functools.cache
def _copying(traffic: int, device: torch.device, threads: int) -> float:
    source = torch.ones(traffic // 2, dtype=torch.uint8, device=device)
    clock = clock_of(device)
    copies = clock.copies((torch.empty_like(source), source))

    def copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return target.copy_(source)

    clock.block(copy, copies, 2)
    count = max(1, round(SECONDS / BLOCKS / clock.block(copy, copies, 3)))
    # the fastest, as a ceiling is
    return traffic / min(clock.block(copy, copies, count) for _ in range(BLOCKS))
