"""The layout of one row of diffusion coefficients, which a step's kernels read."""

from __future__ import annotations

from enum import IntEnum


class Coefficient(IntEnum):
    """Columns of the float32 coefficient table; ᾱ is the cumulative product of 1−β, k the respaced index of K."""

    SQRT_RECIP_ALPHAS_CUMPROD = 0  # √(1/ᾱ)
    SQRT_RECIPM1_ALPHAS_CUMPROD = 1  # √(1/ᾱ − 1)
    POSTERIOR_MEAN_X0 = 2  # β √ᾱ₋ / (1−ᾱ)
    POSTERIOR_MEAN_XT = 3  # (1−ᾱ₋) √(1−β) / (1−ᾱ)
    LOG_VARIANCE_MAX = 4  # log β
    LOG_VARIANCE_MIN = 5  # log β̃, clipped at the first step
    FIXED_VARIANCE = 6  # what guidance is multiplied by when the model predicts no variance
    FIXED_NOISE_SCALE = 7  # what noise is multiplied by then
    SQRT_ALPHAS_CUMPROD_PREV = 8  # √ᾱ₋
    DDIM_DIRECTION = 9  # √(1 − ᾱ₋ − σ²)
    DDIM_SIGMA = 10  # σ
    SQRT_ONE_MINUS_ALPHAS_CUMPROD = 11  # √(1−ᾱ)
    SINE = 12  # sin(πk/K)
    HAS_NOISE = 13  # 1 if k > 0, else 0
    DRAW = 14  # which draw of noise the step uses: K − k, as x_T is draw 0
    TIMESTEP = 15  # the original integer timestep


ROW_LENGTH = 16
