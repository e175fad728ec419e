"""Guided sampling as guided-diffusion and EluCD do it, restated: eager, one small operation after another.

Their reverse process keeps its coefficients in NumPy, and brings those of each step to the device as a tensor of the
image's shape. EluCD takes the gradient at the clipped x̂₀ and shifts the posterior's mean by variance times gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from calguide_fast.schedule import Timeline

Gradient = Callable[[Tensor], Tensor]


class EagerDiffusion:
    """The guided DDPM sampler with learned-range variance, of the timesteps that a timeline keeps."""

    def __init__(self, timeline: Timeline) -> None:
        bar = timeline.alphas_cumprod
        before = np.append(1.0, bar[:-1])
        betas = 1 - bar / before
        posterior = betas * (1 - before) / (1 - bar)
        self.timesteps = timeline.timesteps
        self.x_to_x0, self.eps_to_x0 = np.sqrt(1 / bar), np.sqrt(1 / bar - 1)
        self.mean_x0 = betas * np.sqrt(before) / (1 - bar)
        self.mean_x = (1 - before) * np.sqrt(1 - betas) / (1 - bar)
        self.log_largest, self.log_least = np.log(betas), np.log(np.append(posterior[1], posterior[1:]))

    def sample(self, model: Callable[..., Tensor], gradient: Callable[..., Tensor], labels: Tensor, noise: Iterator):
        """Images (B, C, *spatial); noise gives x_T, and then one draw for each step."""
        x = next(noise)
        for k in reversed(range(len(self.timesteps))):
            index = torch.tensor([k] * len(x), device=x.device)
            with torch.no_grad():
                x = self._step(model, gradient, x, index, labels, next(noise))
        return x

    def _step(
        self, model: Callable[..., Tensor], gradient: Callable[..., Tensor], x: Tensor, index: Tensor, labels, noise
    ) -> Tensor:
        t = torch.tensor(self.timesteps, device=x.device)[index]
        eps, v = torch.split(model(x, t, y=labels), x.shape[1], dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * _at(self.log_largest, index, x) + (1 - fraction) * _at(self.log_least, index, x)
        variance = torch.exp(log_variance)
        x0 = (_at(self.x_to_x0, index, x) * x - _at(self.eps_to_x0, index, x) * eps).clamp(-1, 1)
        mean = _at(self.mean_x0, index, x) * x0 + _at(self.mean_x, index, x) * x
        mean = mean.float() + variance * gradient(x0, labels).float()
        not_last = (index != 0).float().view(-1, *[1] * (x.ndim - 1))
        return mean + not_last * torch.exp(0.5 * log_variance) * noise


def _at(table: np.ndarray, index: Tensor, like: Tensor) -> Tensor:
    """A step's coefficient, of the images' shape."""
    values = torch.from_numpy(table).to(index.device)[index].float()
    return values.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def gradient_of(
    classifier: Callable[[Tensor], Tensor], score: Callable[[Tensor, Tensor], Tensor], scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The image gradient of a score of the classifier's logits, by autograd."""

    def run(x: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(score(classifier(x), labels).sum(), x)[0] * scale

    return run


def drawn(shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Fresh noise without end."""
    while True:
        yield torch.randn(shape, device=device)
