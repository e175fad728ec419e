"""k-diffusion's denoisers, denoiser(x, sigma, **extra): as models here, and from models here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from calguide_fast.schedule import Schedule

from .denoiser import DenoiserModel
from .noise_levels import NoiseLevels, per_image, widened


def from_k_diffusion(
    denoiser: Callable[..., Tensor],
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor = "linear",
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    image_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    label_keyword: str = "class_cond",
) -> KDiffusionModel:
    """A k-diffusion denoiser as a model of :class:`calguide_fast.FDivSampler`.

    Example::

        model = from_k_diffusion(denoiser, image_size=32, in_channels=3)
        sampler = FDivSampler(model, classifier)

    Args:
        denoiser: ``denoiser(x, sigma, **extra)`` returning D (B, C, *spatial) for x = x₀ + σ n (B, C, *spatial) and
            sigma (B,) float32. It is not copied, and its mode and precision stay as they are.
        schedule: the discrete process that DDPM and DDIM sampling follow; any, as the denoiser knows every σ.
        sigma_min, sigma_max: the noise levels to sample between; read off the denoiser if not given, or 0.01 and 80
            where it does not say, as in k-diffusion's configurations.
        image_size, in_channels: of the images; FDivSampler's ``shape`` says the same.
        num_classes: None for an unconditional denoiser; else labels are passed on.
        label_keyword: under which the denoiser takes its labels: ``"class_cond"``, k-diffusion's own, or ``"y"``.

    Raises:
        TypeError, ValueError: a denoiser that is not callable, an empty range of noise levels.
    """
    return KDiffusionModel(
        denoiser,
        schedule,
        float(getattr(denoiser, "sigma_min", 0.01) if sigma_min is None else sigma_min),
        float(getattr(denoiser, "sigma_max", 80.0) if sigma_max is None else sigma_max),
        image_size,
        in_channels,
        num_classes,
        label_keyword=label_keyword,
    )


class KDiffusionModel(DenoiserModel):
    """What :func:`from_k_diffusion` returns."""

    def __init__(self, *arguments: Any, label_keyword: str) -> None:
        super().__init__(*arguments)
        self._label_keyword = label_keyword

    def _denoised(self, x: Tensor, sigma: Tensor, y: Tensor | None, **kwargs: Any) -> Tensor:
        if y is not None:
            kwargs[self._label_keyword] = y
        return self.net(x, sigma, **kwargs)


def as_denoiser(
    model: Callable[..., Tensor],
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor | None = None,
    quantize: bool = False,
) -> EpsDenoiser:
    """An ε-model as k-diffusion's samplers take it: D(x; σ) = x − σ ε̂(x/√(1+σ²), t(σ)).

    Example::

        denoiser = as_denoiser(adm_unet("imagenet128"), "linear")
        sigmas = K.sampling.get_sigmas_karras(25, denoiser.sigma_min, denoiser.sigma_max)
        K.sampling.sample_dpmpp_2m(denoiser, x, sigmas, extra_args={"y": labels})

    Args:
        model: ``model(x_t, t, **kwargs)`` returning ε̂ (B, C, *spatial), or ε̂ and v (B, 2C, *spatial), of which v goes
            unused. It gets t (B,) float32, between two timesteps where σ is.
        schedule: of the model, by which σ becomes t; ``model.schedule`` if not given, which the adapters here have.
        quantize: give the model the nearest whole timestep, int64, where it knows no others.

    Raises:
        TypeError, ValueError: a model that is not callable, a schedule that is unknown or not given.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    schedule = getattr(model, "schedule", None) if schedule is None else schedule
    if schedule is None:
        raise ValueError("schedule must be given: the model has none of its own")
    return EpsDenoiser(model, Schedule.of(schedule), quantize)


class EpsDenoiser(nn.Module):
    """What :func:`as_denoiser` returns.

    Attributes:
        sigma_min, sigma_max: the schedule's range of noise levels, floats.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule, quantize: bool) -> None:
        super().__init__()
        self.inner_model = model
        self._quantize = quantize
        self._levels = NoiseLevels(schedule)
        self.sigma_min, self.sigma_max = self._levels.sigma_min, self._levels.sigma_max
        # a module begins in training mode, and this one is in its model's
        self.training = getattr(model, "training", False)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """(B,) timesteps of noise levels (B,): float32, or int64 if quantized."""
        t = self._levels.timestep(sigma)
        return t.round().long() if self._quantize else t

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """(B,) float32 noise levels of timesteps (B,)."""
        return self._levels.sigma(t)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """D (B, C, *spatial) of x (B, C, *spatial) at noise levels sigma (B,); ``kwargs`` go to the model."""
        level = per_image(sigma, x)
        output = self.inner_model(x / (1 + level**2).sqrt(), self.sigma_to_t(sigma), **kwargs)
        return x - level * widened(output[:, : x.shape[1]])
