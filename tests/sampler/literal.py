"""The samplers as their papers write them: plain loops in float64, one step after another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# push(x_t, x0, t, k) gives what guidance adds per unit of variance (DDPM) or of √(1−ᾱ) (DDIM), or None
Push = Callable[[Tensor, Tensor, Tensor, int], Tensor | None]


def linear_alphas_cumprod() -> list[float]:
    bars, bar = [], 1.0
    for t in range(1000):
        bar *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
        bars.append(bar)
    return bars


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def predict(model, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    output = model(x, t)
    return output[:, :3], output[:, 3:] if output.shape[1] > 3 else None


def ddpm(
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Sequence[Tensor],
    timesteps: list[int],
    push: Push = lambda *_: None,
    variance: str = "fixed_small",
    gamma: float = 0.0,
    clip: bool = True,
) -> Tensor:
    """Ancestral sampling; guidance shifts the mean by (variance + boost)·push, boost being EluCD's, image by image."""
    bars = [linear_alphas_cumprod()[t] for t in timesteps]
    draws = iter(noise)
    x = next(draws)
    largest = [0.0] * len(x)
    for k in range(len(timesteps) - 1, -1, -1):
        bar, bar_prev = bars[k], bars[k - 1] if k else 1.0
        beta = 1 - bar / bar_prev
        posterior = beta * (1 - bar_prev) / (1 - bar)
        t = torch.full((len(x),), timesteps[k])
        with torch.no_grad():
            eps, v = predict(model, x, t)
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = beta * math.sqrt(bar_prev) / (1 - bar) * x0 + (1 - bar_prev) * math.sqrt(1 - beta) / (1 - bar) * x
        second = (1 - bars[1] / bars[0]) * (1 - bars[0]) / (1 - bars[1])
        lowest = posterior if k else second
        if v is not None:
            fraction = (v + 1) / 2
            var = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(lowest))
            deviation = var.sqrt()
        elif variance == "fixed_small":
            var, deviation = torch.full_like(x, posterior), math.sqrt(lowest)
        else:
            var = torch.full_like(x, beta if k else second)
            deviation = var.sqrt()
        largest = [max(seen, float(image[0, 0, 0])) for seen, image in zip(largest, var)]
        direction = push(x, x0, t, k)
        if direction is not None:
            boost = torch.tensor(
                [gamma * seen * math.sin(math.pi * k / len(timesteps)) for seen in largest], dtype=x.dtype
            )
            mean = mean + (var + boost[:, None, None, None]) * direction
        z = next(draws)
        x = mean + deviation * z if k else mean
    return x


def ddim(
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Sequence[Tensor],
    timesteps: list[int],
    push: Push = lambda *_: None,
    eta: float = 0.0,
) -> Tensor:
    """Song et al.'s sampler; guidance is Dhariwal and Nichol's shift of ε by −√(1−ᾱ)·push."""
    bars = [linear_alphas_cumprod()[t] for t in timesteps]
    draws = iter(noise)
    x = next(draws)
    for k in range(len(timesteps) - 1, -1, -1):
        bar, bar_prev = bars[k], bars[k - 1] if k else 1.0
        t = torch.full((len(x),), timesteps[k])
        with torch.no_grad():
            eps, _ = predict(model, x, t)
        x0 = ((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)).clamp(-1, 1)
        eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        direction = push(x, x0, t, k)
        if direction is not None:
            eps = eps - math.sqrt(1 - bar) * direction
            x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        sigma = eta * math.sqrt((1 - bar_prev) / (1 - bar)) * math.sqrt(1 - bar / bar_prev)
        z = next(draws)
        x = math.sqrt(bar_prev) * x0 + math.sqrt(1 - bar_prev - sigma**2) * eps
        if k:
            x = x + sigma * z
    return x


def gradient_at(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ of the images' summed score, by autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(score(x).sum(), x)[0]
