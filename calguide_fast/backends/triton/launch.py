"""What every kernel's launch needs: the tensor's own device, numbers in double, tiles in powers of two."""

from __future__ import annotations

import functools
import struct
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, which is where Triton launches."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


# every tile has as many, whatever its width; tests raise it, as the interpreter runs one program after the other
LEAST_ROWS = 1


@functools.lru_cache(maxsize=256)
def doubles(*values: float) -> tuple[int, ...]:
    """Float64 bit patterns: a Python float would reach a kernel rounded to float32."""
    return struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values))


@triton.jit
def as_double(bits):
    """The float64 number of a bit pattern from `doubles`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def tile_shape(columns: int, narrowest: int, widest: int) -> tuple[int, int]:
    """(rows, columns) of a tile, powers of two: one row, if it is not too wide, or several, if it is too narrow."""
    width = max(4, min(triton.next_power_of_2(columns), widest))
    return max(LEAST_ROWS, narrowest // width), width
