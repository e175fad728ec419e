"""EDM's Heun, DPM-Solver++(2M) and EluCD's rule as their papers write them: plain float64 loops, in EDM's scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from literal import linear_alphas_cumprod
from torch import Tensor

# denoise(x, sigma, guided) gives D, with guidance in it where it is wanted
Denoise = Callable[[Tensor, float, bool], Tensor]

LEVELS = [math.sqrt((1 - bar) / bar) for bar in linear_alphas_cumprod()]


def time_at(sigma: float) -> float:
    """The timestep between 0 and 999 that has this noise level, on a straight line in log σ between neighbours."""
    if sigma <= LEVELS[0]:
        return 0.0
    if sigma >= LEVELS[-1]:
        return 999.0
    t = max(t for t in range(999) if LEVELS[t] <= sigma)
    return t + math.log(sigma / LEVELS[t]) / math.log(LEVELS[t + 1] / LEVELS[t])


def karras(n: int, low: float = LEVELS[0], high: float = 80.0) -> list[float]:
    if n == 1:
        return [high, 0.0]
    return [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)] + [0.0]


def eps_denoiser(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """D of an ε-model of the linear schedule."""

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(x),), time_at(sigma), dtype=torch.float64)
        eps = model(x / math.sqrt(1 + sigma**2), t)[:, : x.shape[1]]
        return x - sigma * eps

    return denoise


def heun(
    denoise: Denoise,
    noise: Sequence[Tensor],
    sigmas: list[float],
    guides: Callable[[float], bool] = lambda sigma: True,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    rule: Callable[[Tensor, int], Tensor] | None = None,
    repeats: int = 1,
) -> Tensor:
    """Karras et al., algorithm 2. ``rule(x, i)`` is what EluCD adds; ``repeats`` is Bansal et al.'s k."""
    draws: Iterator[Tensor] = iter(noise)
    n = len(sigmas) - 1
    x = next(draws) * sigmas[0]
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if s_tmin <= sigmas[i] <= s_tmax else 0.0
        hat, following = sigmas[i] * (1 + gamma), sigmas[i + 1]
        times = repeats if guides(hat) else 1
        for time in range(times):
            z = next(draws)
            pushed = rule(x, i) if rule is not None and guides(hat) else 0.0
            x_hat = x + math.sqrt(hat**2 - sigmas[i] ** 2) * s_noise * z + pushed
            d = (x_hat - denoise(x_hat, hat, guides(hat) and rule is None)) / hat
            x = x_hat + (following - hat) * d
            if following:
                slope = (x - denoise(x, following, guides(following) and rule is None)) / following
                x = x_hat + (following - hat) * (d / 2 + slope / 2)
            if time < times - 1:
                x = x + math.sqrt(sigmas[i] ** 2 - following**2) * next(draws)
    return x


def dpmpp_2m(denoise: Denoise, x_t: Tensor, sigmas: list[float], guides=lambda sigma: True) -> Tensor:
    """Lu et al., algorithm 2, in λ = −log σ, for a process whose signal is not scaled (α = 1)."""
    x, before, last_step = x_t * sigmas[0], None, None
    for sigma, following in zip(sigmas, sigmas[1:]):
        d = denoise(x, sigma, guides(sigma))
        if following == 0:
            return d
        h = math.log(sigma) - math.log(following)
        if before is None:
            estimate = d
        else:
            r = last_step / h
            estimate = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * before
        x = following / sigma * x - (math.exp(-h) - 1) * estimate
        before, last_step = d, h
    raise AssertionError("the last noise level is 0")


def elucd_rule(
    gradient: Callable[[Tensor], Tensor], n: int, max_guidance: float, add_factor: float
) -> Callable[[Tensor, int], Tensor]:
    """Ma et al.'s, image by image; ``gradient(x)`` is that of the score."""

    def rule(x: Tensor, i: int) -> Tensor:
        sizes = [float((image**2).mean().sqrt()) for image in x]
        seen = torch.stack([image / size if size > 1 else image for image, size in zip(x, sizes)])
        strength = max(max_guidance / (n + 1) * (n + 1 - i), 0.00001)
        strength += math.sin(i / n * math.pi) * max_guidance * add_factor
        moved = []
        for g, size in zip(gradient(seen), sizes):
            length = float((g**2).mean().sqrt())
            moved.append(g / length * size * strength if length else torch.zeros_like(g))
        return torch.stack(moved)

    return rule
