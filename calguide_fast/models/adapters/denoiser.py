"""A denoiser D(x; σ) as the ε-model of a discrete schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calguide_fast.schedule import Schedule

from ..resnet import ResNet
from ..unet import EncoderUNet, UNet
from .noise_levels import NoiseLevels, per_image, widened


class DenoiserModel(nn.Module):
    """Both faces of a denoiser: D(x; σ) in EDM's scaling x = x₀ + σ n, and ε̂(x_t, t) in that of DDPM.

    x = x_t √(1+σ_t²) and ε̂ = (x − D)/σ_t, with σ_t² = (1−ᾱ_t)/ᾱ_t. Subclasses say in ``_denoised`` how their network
    is called.

    Attributes:
        schedule: what ``t`` counts; :class:`calguide_fast.FDivSampler` reads it off, too.
        sigma_min, sigma_max: the noise levels to sample between, in EDM's units.
        image_size, in_channels, num_classes, class_conditional: what :class:`calguide_fast.FDivSampler` reads off.

    Source: Karras et al., arXiv 2206.00364, table 1.
    """

    def __init__(
        self,
        net: Any,
        schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor,
        sigma_min: float,
        sigma_max: float,
        image_size: int | Sequence[int] | None,
        in_channels: int | None,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"the network must be callable, got {type(net).__name__}")
        if isinstance(net, (UNet, EncoderUNet, ResNet)):
            raise TypeError(
                f"the network must be a denoiser net(x, sigma), and this package's {type(net).__name__} takes no "
                "sigma; calguide_fast.FDivSampler takes a UNet as it is"
            )
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min!r} and sigma_max={sigma_max!r} must be 0 < sigma_min < sigma_max")
        self.net = net
        self.schedule = Schedule.of(schedule)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.class_conditional = num_classes is not None
        self._levels = NoiseLevels(self.schedule)
        # a module begins in training mode, and this one is in its network's
        self.training = getattr(net, "training", False)

    def _denoised(self, x: Tensor, sigma: Tensor, y: Tensor | None, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def denoise(self, x: Tensor, sigma: Tensor | float, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """D(x; σ), the expected clean image.

        Args:
            x: (B, C, *spatial) = x₀ + σ n.
            sigma: (B,) or one number for all.
            y: (B,) labels of a class-conditional model.
            **kwargs: further arguments of the network.

        Returns:
            (B, C, *spatial), at least float32.
        """
        x = widened(x)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        return widened(self._denoised(x, sigma, y, **kwargs))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """ε̂ (B, C, *spatial) of x_t (B, C, *spatial) at timesteps t (B,), whole ones or between two."""
        sigma = self._levels.sigma(t)
        level = per_image(sigma, x_t)
        x = widened(x_t) * (1 + level**2).sqrt()
        return (x - self.denoise(x, sigma, y, **kwargs)) / level
