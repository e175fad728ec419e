"""What a step of any method is given, keeps and leaves; the steps are in `diffusion_step` and `solver_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast.guidance import Guidance, ImageGradient
from calguide_fast.guides import Guide
from calguide_fast.predictor import Predictor
from calguide_fast.samples import Diagnostics
from calguide_fast.scratch import Scratch


class Kind(NamedTuple):
    """In what, other than the values of tensors, one step differs from another of the same sampler."""

    method: str
    guided: bool
    seeded: bool  # whether its noise is drawn from the seeds, inside
    corrected: bool | None  # by Heun: guided or not; None without a correction
    keep_x0: bool


class State(NamedTuple):
    """What lasts while a batch is sampled; steps write to all but labels and seeds."""

    x_t: Tensor  # (B, C, *spatial) float32
    labels: Tensor  # (B,) int64
    seeds: Tensor  # (B,) int64
    variance_max: Tensor | None  # (B,) float32, with a sine boost
    denoised: Tensor | None  # (B, C, *spatial) float32, of the step before, for DPM-Solver++


class Inputs(NamedTuple):
    """What is new at each step."""

    t: Tensor | None  # (B,) int64; a solver finds its own in the coefficients
    coefficients: Tensor  # (16,) float32, or (14,) of a solver
    noise: Tensor | None  # (B, C, *spatial) float32, where it is given


class Left(NamedTuple):
    """What a step leaves beside x_t."""

    x0: Tensor | None  # (B, C, *spatial), a buffer
    diagnostics: Tensor | None  # (4, B) float32


@dataclass(frozen=True)
class Parts:
    """What the steps of a run work with.

    Attributes:
        predictor: the model.
        guide: what gives image gradients; None without.
        guidance: its settings; of a run without guidance, those that change nothing.
        clip_denoised: clip x̂₀ to [−1, 1].
        diagnostics: whether to record them.
        group: of ``torch.distributed``, whose images are tilted together.
        scratch: the run's buffers.
    """

    predictor: Predictor
    guide: Guide | None
    guidance: Guidance
    clip_denoised: bool
    diagnostics: bool
    group: torch.distributed.ProcessGroup | None
    scratch: Scratch

    @property
    def sees_x0(self) -> bool:
        """Whether guidance looks at x̂₀."""
        return self.guide is not None and self.guide.sees_x0

    def gradient(self, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch) -> ImageGradient:
        """The guide's, at x."""
        assert self.guide is not None
        return self.guide.gradient(self.guidance, x, t, labels, scratch)

    def left(self, x0: Tensor | None, found: ImageGradient | None, weights: Tensor | None) -> Left:
        if found is None or not self.diagnostics:
            return Left(x0, None)
        if found.gradient.device.type == "cpu":
            # PyTorch's norm would widen a copy of its own; a GPU's reads narrow elements as they are
            found = found._replace(gradient=self.scratch.cast("gradient", found.gradient, torch.float32))
        return Left(x0, Diagnostics.of_step(found, weights))
