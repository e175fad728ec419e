"""Every Gaussian draw of one batch, in order of use: from the images' seeds, or as they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from calguide_fast.backends.philox import RECURRENCE_STREAM
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.scratch import Scratch

Noise = Tensor | Callable[[], Tensor]


def check_noise(noise: Any, steps: int, repetitions: int, count: int, shape: tuple[int, ...]) -> None:
    """Whether this can be the noise of a run.

    Args:
        noise: what the caller gave.
        steps: of the run.
        repetitions: how often a step is taken again, in all.
        count: N.
        shape: (C, *spatial).

    Raises:
        TypeError: neither a tensor nor a callable nor None.
        ValueError: a tensor of another shape than (draws, N, C, *spatial).
    """
    if noise is not None and not isinstance(noise, Tensor) and not callable(noise):
        raise TypeError(f"noise must be a tensor, a callable that returns one, or None; got {type(noise).__name__}")
    expected = (1 + steps + 2 * repetitions, count, *shape)
    if isinstance(noise, Tensor) and tuple(noise.shape) != expected:
        first = "steps+1 and two for each repetition of a guided step" if repetitions else "steps+1"
        raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be ({first}, N, C, *spatial) = {expected}")


class Draws:
    """The noise of one batch. What is drawn from seeds after the start lies in one buffer: the next draw writes to it.

    From seeds, draw 0 of the sampler's stream is x_T and draw i that of step i, counted from 1; what a recurrence draws
    beyond that comes from a stream of its own, one after another.

    Args:
        noise: (draws, N, C, *spatial), or a callable that returns one (B, C, *spatial) after another; None for the
            seeds' own.
        images: which of the N images the batch is.
        seeds: (B,) int64 on the device.
        shape: (C, *spatial).
        device: where the draws are wanted.
    """

    def __init__(
        self, noise: Noise | None, images: slice, seeds: Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.given = noise is not None
        self._seeds, self._shape, self._device = seeds, shape, device
        self._in_order = self._read(noise, images)
        self._steps = self._repeats = 0
        self._scratch = Scratch()

    def start(self) -> Tensor:
        """x_T, a tensor of its own."""
        draw = next(self._in_order) if self.given else sampling_noise(self._seeds, self._shape, draw=0)
        return draw.to(self._device, torch.float32, copy=True)

    def step(self, used: bool = True, inside: bool = False) -> Tensor | None:
        """The next step's.

        Args:
            used: whether the step has any use for it; None if it has not.
            inside: whether the step draws from the seeds itself; None for that.
        """
        self._steps += 1
        draw = next(self._in_order) if self.given else None
        if not used:
            return None
        if draw is None and not inside:
            draw = self._drawn(self._steps)
        return draw

    def repeat(self, used: bool = True) -> Tensor | None:
        """The next one of a recurrence; None if there is no use for it."""
        self._repeats += 1
        draw = next(self._in_order) if self.given else None
        if not used:
            return None
        if draw is None:
            draw = self._drawn(self._repeats - 1, RECURRENCE_STREAM)
        return draw

    def _drawn(self, draw: int, stream: int = 0) -> Tensor:
        shape = len(self._seeds), *self._shape
        out = self._scratch.take("noise", self._seeds, torch.float32, shape=shape)
        return sampling_noise(self._seeds, self._shape, draw, stream, out=out)

    def _read(self, noise: Noise | None, images: slice) -> Iterator[Tensor]:
        if isinstance(noise, Tensor):
            for draw in noise:
                yield _uploaded(draw[images], self._device)
        while callable(noise):
            yield self._checked(noise())

    def _checked(self, draw: Tensor) -> Tensor:
        expected = (len(self._seeds), *self._shape)
        if not isinstance(draw, Tensor) or tuple(draw.shape) != expected:
            raise ValueError(f"noise() must return a tensor of shape {expected}, got {getattr(draw, 'shape', draw)!r}")
        return _uploaded(draw, self._device)


def _uploaded(draw: Tensor, device: torch.device) -> Tensor:
    """The draw on the device as float32; the host does not wait for its copy."""
    draw = draw.to(torch.float32)
    if device.type == "cuda" and draw.device.type == "cpu":
        # a page-locked buffer of its own: the caller may write to the draw again before the copy is made. PyTorch keeps
        # such buffers, and gives one out again once the device has read it
        return torch.empty_like(draw, pin_memory=True).copy_(draw).to(device, non_blocking=True)
    return draw.to(device)
