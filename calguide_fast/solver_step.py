"""A guided step in EDM's scaling, x = x₀ + σ n: the denoised image, moved by guidance, and a solver's way along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast import edm_rule
from calguide_fast.guidance import ImageGradient
from calguide_fast.guides import per_image, weights_of
from calguide_fast.karras import Level, Solve
from calguide_fast.ops import checks
from calguide_fast.scratch import Scratch
from calguide_fast.solvers import dpmpp_, euler_, heun_
from calguide_fast.steps import Inputs, Kind, Left, Parts, State


class Pull(NamedTuple):
    """What guidance has to say on a batch."""

    found: ImageGradient | None = None  # None where it is off
    weights: Tensor | None = None  # (B,) float32, of a tilt


class Denoised(NamedTuple):
    """A guided denoiser's result."""

    image: Tensor  # (B, C, *spatial) float32
    x0: Tensor | None  # (B, C, *spatial), what was classified or is to be kept
    pull: Pull


@dataclass(frozen=True)
class SolverStep:
    """x at one noise level becomes x at the next, in place."""

    parts: Parts

    def __call__(self, kind: Kind, state: State, inputs: Inputs) -> Left:
        x, labels, row, scratch = state.x_t, state.labels, inputs.coefficients, self.parts.scratch
        by_rule = kind.guided and self.parts.guidance.rule == "edm"
        shift, pull = self._edm_rule(x, row, labels) if by_rule else (None, None)
        if inputs.noise is not None:
            x.addcmul_(inputs.noise, row[Solve.CHURN])
        if shift is not None:
            x += shift
        here = self._denoised(x, row[:4], labels, kind.guided and not by_rule, kind.keep_x0, scratch)
        if kind.method == "dpmpp":
            assert state.denoised is not None
            dpmpp_(x, here.image, state.denoised, row)
        elif kind.corrected is None:
            euler_(x, here.image, row)
        else:
            # beside the buffers of the first evaluation, as what it left is still read
            guided, again = kind.corrected, scratch.part("correction")
            heun_(
                x,
                here.image,
                row,
                lambda x: self._denoised(x, row[4:8], labels, guided, False, again).image,
                euler=scratch.take("euler", x),
            )
        found, weights = here.pull if pull is None else pull
        return self.parts.left(here.x0, found, weights)

    def _denoised(
        self, x: Tensor, level: Tensor, labels: Tensor, guided: bool, keep_x0: bool, scratch: Scratch
    ) -> Denoised:
        """D(x; σ), moved by guidance."""
        parts, pull = self.parts, Pull()
        t = level[Level.TIMESTEP].repeat(len(x))
        image = parts.predictor.denoised(x, level, t, labels, scratch)
        x0 = None
        if keep_x0 or guided and parts.sees_x0:
            x0 = torch.clamp(image, -1, 1, out=scratch.take("x0", x)) if parts.clip_denoised else image
        if guided:
            seen = x0 if parts.sees_x0 else torch.mul(x, level[Level.SHRINK], out=scratch.take("seen", x))
            assert seen is not None
            pull = self._pull(seen, t, labels, scratch)
            assert pull.found is not None
            push = level[Level.PUSH] * parts.guidance.scale
            if pull.weights is not None:
                push = push * per_image(pull.weights, x)
            image = torch.addcmul(image, pull.found.gradient, push, out=scratch.take("guided image", x))
        if parts.clip_denoised and parts.predictor.denoise is None:
            image.clamp_(-1, 1)
        return Denoised(image, x0, pull)

    def _pull(
        self, x: Tensor, t: Tensor, labels: Tensor, scratch: Scratch, layout: torch.memory_format | None = None
    ) -> Pull:
        """The guide's, its gradient widened to float32, into this layout if it matters."""
        found = self.parts.gradient(x, t, labels, scratch)
        checks.shaped("gradient", found.gradient, x.shape)
        found = found._replace(gradient=scratch.cast("gradient", found.gradient, torch.float32, layout))
        return Pull(found, weights_of(self.parts.guidance, found, self.parts.group))

    def _edm_rule(self, x: Tensor, row: Tensor, labels: Tensor) -> tuple[Tensor, Pull]:
        """What EluCD's rule adds to x, and of what it is made."""
        guidance, scratch = self.parts.guidance, self.parts.scratch
        seen, size = edm_rule.classified_at(x, scratch)
        pull = self._pull(seen, row[Level.TIMESTEP], labels, scratch, torch.preserve_format)
        assert pull.found is not None
        shift = edm_rule.shift(size, pull.found.gradient, row, guidance.max_guidance, guidance.add_factor, scratch)
        # of scale the sign alone: a product with a half-precision gradient might be 0 or infinite
        shift *= float(guidance.scale > 0) - float(guidance.scale < 0)
        return shift if pull.weights is None else shift.mul_(per_image(pull.weights, x)), pull
