"""The model as a sampler asks it: with its labels and classifier-free guidance, in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calguide_fast.karras import Level
from calguide_fast.networks import apart, at_most_float32
from calguide_fast.ops import checks
from calguide_fast.scratch import Scratch


@dataclass(frozen=True)
class Predictor:
    """What a model predicts of a batch.

    Attributes:
        model: ``model(x_t, t, **model_kwargs)``, giving ε̂ (B, C, *spatial), or ε̂ and v.
        denoise: ``denoise(x, sigma, **model_kwargs)`` of an EDM denoiser; None if the model is none.
        dtype: of the model's input.
        channels: C.
        class_conditional: whether the model takes ``y``.
        cfg_scale: w of classifier-free guidance ε̂_u + w (ε̂_c − ε̂_u).
        null_class: the label that makes the model unconditional.
        model_kwargs: of every call.
    """

    model: Callable[..., Tensor]
    denoise: Callable[..., Tensor] | None
    dtype: torch.dtype
    channels: int
    class_conditional: bool
    cfg_scale: float
    null_class: int | None
    model_kwargs: Mapping[str, Any]

    def output(self, x_t: Tensor, t: Tensor, labels: Tensor, scratch: Scratch) -> Tensor:
        """ε̂, or ε̂ and v, of a discrete process; it does not lie in x_t's memory."""
        given = scratch.cast("model input", x_t, self.dtype)
        return apart(at_most_float32(self._conditioned(self.model, given, t, labels, scratch)), x_t)

    def denoised(self, x: Tensor, level: Tensor, t: Tensor, labels: Tensor, scratch: Scratch) -> Tensor:
        """D(x; σ) without guidance, float32, x in EDM's scaling: of the denoiser, or from ε̂ of a discrete process.

        Args:
            x: (B, C, *spatial) float32.
            level: (4,) float32, the columns of :class:`calguide_fast.karras.Level`.
            t: (B,) float32, the same level as a timestep.
            labels: (B,) int64.
            scratch: where the result may lie.
        """
        if self.denoise is not None:
            image = self._conditioned(self.denoise, x, level[Level.SIGMA].repeat(len(x)), labels, scratch)
            checks.shaped("model.denoise(x, sigma)", image, x.shape)
            return apart(scratch.cast("image", image, torch.float32), x)
        x_t = torch.mul(x, level[Level.SHRINK], out=scratch.take("x_t", x))
        eps = self.output(x_t, t, labels, scratch)[:, : self.channels]
        checks.shaped("the model's eps", eps, x.shape)
        eps = scratch.cast("eps", eps, torch.float32)
        return torch.addcmul(x, eps, level[Level.SIGMA], value=-1, out=scratch.take("image", x))

    def _conditioned(
        self, network: Callable[..., Tensor], x: Tensor, level: Tensor, labels: Tensor, scratch: Scratch
    ) -> Tensor:
        """The network's output at x and (B,) timesteps or noise levels, with classifier-free guidance if there is."""
        if not self.class_conditional:
            return _checked(network(x, level, **self.model_kwargs))
        if self.cfg_scale == 1.0 or self.null_class is None:
            return _checked(network(x, level, y=labels, **self.model_kwargs))
        null = torch.full_like(labels, self.null_class)
        twice = torch.cat([x, x], out=scratch.take("twice", x, shape=(2 * len(x), *x.shape[1:])))
        both = _checked(network(twice, level.repeat(2), y=torch.cat([labels, null]), **self.model_kwargs))
        conditional, unconditional = both.chunk(2)
        mixed, channels = scratch.take("mixed", conditional), self.channels
        torch.lerp(unconditional[:, :channels], conditional[:, :channels], self.cfg_scale, out=mixed[:, :channels])
        mixed[:, channels:] = conditional[:, channels:]
        return mixed


def _checked(output: Any) -> Tensor:
    """What a network returned, if it is a tensor."""
    if isinstance(output, Tensor):
        return output
    hint = ""
    if hasattr(output, "sample") or isinstance(output, dict) and "sample" in output:
        hint = "; calguide_fast.models.from_diffusers takes networks of diffusers, whose outputs have .sample"
    raise TypeError(
        f"the model must return a tensor: eps (B, C, *spatial), eps and v (B, 2C, *spatial), or the denoised images; "
        f"got {type(output).__name__}{hint}"
    )
