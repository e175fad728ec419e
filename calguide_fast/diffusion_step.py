"""A guided step of DDPM or DDIM: the model, x̂₀, the classifier's gradient, and the reverse step in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calguide_fast.guides import Classifiers, weights_of
from calguide_fast.networks import apart
from calguide_fast.ops.step import guided_step, predict_x0
from calguide_fast.steps import Inputs, Kind, Left, Parts, State


@dataclass(frozen=True)
class DiffusionStep:
    """x_t becomes x_{t−1}, in place."""

    parts: Parts

    def __call__(self, kind: Kind, state: State, inputs: Inputs) -> Left:
        parts, guidance, scratch = self.parts, self.parts.guidance, self.parts.scratch
        x_t, labels = state.x_t, state.labels
        t, coefficients, noise = inputs
        assert t is not None
        model_output = parts.predictor.output(x_t, t, labels, scratch)

        x0 = found = scores = weights = None
        if kind.keep_x0 or kind.guided and parts.sees_x0:
            x0 = self._predict_x0(x_t, model_output, coefficients)
        if kind.guided:
            seen = x0 if parts.sees_x0 else x_t
            assert seen is not None
            found = parts.gradient(seen, t, labels, scratch)
            if parts.group is not None:
                weights = weights_of(guidance, found, parts.group)
            elif found.stats is not None:
                scores = guidance.tilted(found.stats)

        guided_step(
            x_t,
            model_output,
            coefficients,
            apart(found.gradient, x_t) if found is not None else None,
            method=kind.method,
            scale=guidance.scale,
            weights=weights,
            scores=scores,
            tilt=guidance.tilt,
            max_weight=guidance.tilt_max,
            noise=noise,
            seeds=state.seeds if kind.seeded else None,
            variance_max=state.variance_max,
            sine_boost=guidance.sine_boost,
            clip=parts.clip_denoised,
            out=x_t,
        )
        if parts.diagnostics and scores is not None and found is not None:
            weights = weights_of(guidance, found)
        return parts.left(x0, found, weights)

    def _predict_x0(self, x_t: Tensor, model_output: Tensor, coefficients: Tensor) -> Tensor:
        """x̂₀ as the classifiers want it; or as it is, for some that differ in that and for none."""
        guide = self.parts.guide
        wanted = guide.input_of_all() if isinstance(guide, Classifiers) and guide.sees_x0 else None
        dtype, layout = (torch.float32, torch.contiguous_format) if wanted is None else wanted
        dtype = torch.float32 if dtype == torch.float64 else dtype
        out = self.parts.scratch.take("x0", x_t, dtype, layout)
        return predict_x0(x_t, model_output, coefficients, self.parts.clip_denoised, out=out)
