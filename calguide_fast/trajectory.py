"""The way that images took: some of a sampler's steps, kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calguide_fast.ops.checks import is_integer
from calguide_fast.summary import summary

OF = ("x", "x0")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was kept of n of the K steps, in order of use.

    Attributes:
        of: ``"x"``: what the sampler had after the step; ``"x0"``: the clean image that the model saw before it, as a
            classifier does, before guidance.
        steps: (n,) int64 on the CPU, which steps, counted from 0.
        sigmas: (n,) float64 on the CPU, the noise levels before them.
        images: (n, N, C, *spatial) float32 on the sampler's device: n times the memory of the samples.
    """

    of: str
    steps: Tensor
    sigmas: Tensor
    images: Tensor

    __repr__ = summary

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def empty(
        cls, keep: int | bool, of: str, sigmas: Tensor, count: int, shape: tuple[int, ...], device: torch.device
    ) -> Trajectory | None:
        """Room for it, or None if nothing is to be kept.

        Args:
            keep: how many steps, evenly spaced and the last among them; True for all.
            of: ``"x"`` or ``"x0"``.
            sigmas: (K,) of all steps, in order of use.
            count: N.
            shape: (C, *spatial).
            device: where.
        """
        if of not in OF:
            raise ValueError(f"trajectory_of={of!r} must be 'x' or 'x0'")
        if not (isinstance(keep, bool) or is_integer(keep)) or not 0 <= keep <= len(sigmas):
            raise ValueError(f"trajectory={keep!r} must be True or a number of steps to keep, in 0..{len(sigmas)}")
        if not keep:
            return None
        wanted = len(sigmas) if keep is True else keep
        steps = torch.arange(1, wanted + 1, device="cpu") * len(sigmas) // wanted - 1
        images = torch.empty((wanted, count, *shape), dtype=torch.float32, device=device)
        return cls(of, steps, sigmas[steps], images)

    def write(self, step: int, batch: slice, x: Tensor, x0: Tensor | None) -> None:
        """Keep what one step gave to some of the images, if it is one of those to keep."""
        steps = self.steps.tolist()
        if step in steps:
            value = x if self.of == "x" else x0
            assert value is not None
            self.images[steps.index(step), batch] = value
