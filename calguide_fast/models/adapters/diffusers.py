"""diffusers' UNet2DModel and its scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calguide_fast.schedule import Schedule

from .noise_levels import NoiseLevels, per_image, widened

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def from_diffusers(unet: Any, scheduler: Any = None) -> DiffusersModel:
    """A diffusers ``UNet2DModel`` as a model of :class:`calguide_fast.FDivSampler`.

    Example::

        pipeline = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
        model = from_diffusers(pipeline.unet.eval(), pipeline.scheduler)
        sampler = FDivSampler(model, classifier)
        sampler.sample(labels, steps="ddim25", method="ddim")

    FDivSampler then does what the scheduler's ``step`` does, where these settings agree: ``variance`` with its
    ``variance_type``, ``clip_denoised`` with ``clip_sample`` (to [−1, 1]; ``use_clipped_model_output`` of DDIM), and
    the timesteps: ``steps="ddim25"`` visits those of ``timestep_spacing="leading"`` with 25 steps, where 25 divides T,
    and ``"25"`` those of ``"linspace"``.

    Args:
        unet: a ``UNet2DModel``, unconditional or with ``num_class_embeds``, that predicts no variance:
            ``unet(sample, timestep, class_labels).sample`` is (B, C, H, W) for a sample (B, C, H, W). It is not copied,
            and its mode, precision and device stay as they are.
        scheduler: its scheduler: DDPM, DDIM or another that has ``alphas_cumprod``; its ``prediction_type`` may be
            ``"epsilon"``, ``"v_prediction"`` or ``"sample"``. None: ε, and the linear schedule of 1000 steps.

    Returns:
        :class:`DiffusersModel`, an ε-model with the ``schedule`` that belongs to it.

    Raises:
        TypeError: the network has no configuration of a UNet2DModel, or the scheduler no ᾱ.
        ValueError: the network predicts a variance, or something that is not known here; the schedule ends in pure
            noise (``rescale_betas_zero_snr``), where no ε says what the image is.
    """
    config: Any = getattr(unet, "config", None)
    if not hasattr(config, "in_channels") or not hasattr(config, "out_channels"):
        raise TypeError(f"unet must be a diffusers UNet2DModel, got {type(unet).__name__}")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"unet has out_channels={config.out_channels} for in_channels={config.in_channels}; they must be the same: "
            "a learned variance is not read"
        )
    if getattr(config, "class_embed_type", None) is not None:
        raise ValueError(f"unet has class_embed_type={config.class_embed_type!r}; it must be None, for integer labels")
    if scheduler is None:
        return DiffusersModel(unet, "epsilon", Schedule.linear())
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise TypeError(f"scheduler must have alphas_cumprod, as DDPMScheduler has; got {type(scheduler).__name__}")
    if not table[-1] > 0:
        raise ValueError(
            "scheduler ends in pure noise (rescale_betas_zero_snr=True), which no eps-model can begin from"
        )
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"scheduler has prediction_type={prediction!r}; it must be one of {', '.join(PREDICTIONS)}")
    return DiffusersModel(unet, prediction, Schedule(table.double().cpu().numpy()))


class DiffusersModel(nn.Module):
    """What :func:`from_diffusers` returns.

    Attributes:
        unet: the network itself.
        schedule: of the scheduler; :class:`calguide_fast.FDivSampler` reads it off, as it does the others.
        image_size, in_channels, num_classes, class_conditional: of the network.
    """

    def __init__(self, unet: Any, prediction: str, schedule: Schedule) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule
        self.image_size = getattr(unet.config, "sample_size", None)
        self.in_channels = unet.config.in_channels
        self.num_classes = getattr(unet.config, "num_class_embeds", None)
        self.class_conditional = self.num_classes is not None
        self._prediction = prediction
        self._levels = NoiseLevels(schedule)
        # a module begins in training mode, and this one is in its network's
        self.training = getattr(unet, "training", False)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """ε̂ (B, C, H, W) of x_t (B, C, H, W) at timesteps t (B,), with labels y (B,) if class-conditional."""
        output = self.unet(x_t.to(self.unet.dtype), t, class_labels=y, **kwargs).sample
        if self._prediction == "epsilon":
            return output
        sigma = per_image(self._levels.sigma(t), x_t)
        x_t, output = widened(x_t), widened(output)
        if self._prediction == "sample":
            # x_t √(1+σ²) = x₀ + σ ε
            return (x_t * (1 + sigma**2).sqrt() - output) / sigma
        # v = √ᾱ ε − √(1−ᾱ) x₀ (Salimans & Ho, arXiv 2202.00512), so that ε = √ᾱ v + √(1−ᾱ) x_t
        return (output + sigma * x_t) / (1 + sigma**2).sqrt()
