"""Buffers of a sampler's steps: one step writes to them and the next again, so that none allocates after the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calguide_fast.networks import is_channels_last


class Scratch:
    """Buffers by name, each made when it is first asked for.

    A name's buffer is made anew where another shape, dtype, device or layout is asked for, as by a last, smaller batch.

    Args:
        kept: whether to keep them. A recording keeps the memory that its step allocated, so that its buffers must be
            of that memory: without ``kept``, each is a new tensor.
    """

    def __init__(self, kept: bool = True) -> None:
        self._kept = kept
        self._held: dict[str, tuple[object, Tensor]] = {}
        self._parts: dict[str, Scratch] = {}

    def take(
        self,
        name: str,
        like: Tensor,
        dtype: torch.dtype | None = None,
        layout: torch.memory_format = torch.contiguous_format,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """The buffer, on the device of ``like``, and of its dtype and shape if no others are given; any values.

        ``torch.preserve_format`` as the layout is that of ``like``: a sum over elements in another order rounds
        otherwise.
        """
        if layout == torch.preserve_format:
            layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
        dtype = like.dtype if dtype is None else dtype
        shape = like.shape if shape is None else torch.Size(shape)
        wanted = shape, like.device, dtype, layout
        held = self._held.get(name)
        if held is not None and held[0] == wanted:
            return held[1]
        # a plain tensor, whatever subclass the other is of
        made = torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)
        if self._kept:
            self._held[name] = wanted, made
        return made

    def cast(self, name: str, x: Tensor, dtype: torch.dtype, layout: torch.memory_format | None = None) -> Tensor:
        """``x`` in another dtype, and a layout if that matters, in a buffer; itself where it is so already."""
        if x.dtype == dtype and (layout in (None, torch.preserve_format) or x.is_contiguous(memory_format=layout)):
            return x
        return self.take(name, x, dtype, torch.contiguous_format if layout is None else layout).copy_(x)

    def part(self, name: str) -> Scratch:
        """Buffers beside these, for what uses the same names while these are still read."""
        return self._parts.setdefault(name, Scratch(self._kept))
