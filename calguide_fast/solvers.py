"""Solvers in EDM's scaling, x = x₀ + σ n: one step from the noise level σ̂ to the next, given denoised images.

Both follow dx/dσ = (x − D(x; σ))/σ, D the denoised image. Coefficients are () float32 tensors of a row of
:meth:`calguide_fast.karras.KarrasLevels.table`, so that one recording serves every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calguide_fast.karras import Solve

SOLVERS = ("heun", "dpmpp")


def euler_(x: Tensor, denoised: Tensor, row: Tensor) -> None:
    """x + (σ' − σ̂)(x − D)/σ̂, in place."""
    x.lerp_(denoised, row[Solve.WAY])


def heun_(x: Tensor, denoised: Tensor, row: Tensor, denoise_next: Callable[[Tensor], Tensor], euler: Tensor) -> None:
    """Heun's step in place: Euler's, then again with the mean of the slopes at both its ends.

    Karras et al., arXiv 2206.00364, algorithm 2, lines 7 to 11.

    Args:
        x: (B, C, *spatial) float32 at σ̂.
        denoised: D(x; σ̂).
        row: of coefficients.
        denoise_next: D(·; σ').
        euler: a buffer of x's shape and dtype.
    """
    torch.lerp(x, denoised, row[Solve.WAY], out=euler)
    denoised_next = denoise_next(euler)
    # x + ½(σ' − σ̂)(d + d') is halfway to Euler's, and ½(σ' − σ̂) d' from there
    x.lerp_(euler, 0.5).addcmul_(euler.sub_(denoised_next), row[Solve.HALF_STEP])


def dpmpp_(x: Tensor, denoised: Tensor, before: Tensor, row: Tensor) -> None:
    """DPM-Solver++(2M)'s step, in place: linear in −log σ through this step's D and the one's before.

    (σ'/σ) x + (1 − σ'/σ) ((1 + 1/(2r)) D − 1/(2r) D₋), r the ratio of the last step to this one in log σ; the first
    step and the last, to σ' = 0, take D by itself.

    Lu et al., arXiv 2211.01095, algorithm 2, with 2M's coefficients in σ as k-diffusion has them.

    Args:
        x: (B, C, *spatial) float32 at σ.
        denoised: D(x; σ); kept in ``before``.
        before: D of the step before; any finite values at the first step.
        row: of coefficients.
    """
    x.lerp_(torch.lerp(denoised, before, row[Solve.EXTRAPOLATION], out=before), row[Solve.WAY])
    before.copy_(denoised)
