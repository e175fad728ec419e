"""EDM's networks: net(x, sigma, class_labels) gives the denoised image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calguide_fast.schedule import Schedule

from .denoiser import DenoiserModel


def from_edm(
    net: Any,
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor = "linear",
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    image_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    label_dim: int | None = None,
) -> EDMModel:
    """An EDM network as a model of :class:`calguide_fast.FDivSampler`: an ε-model that can denoise directly, too.

    Example::

        model = from_edm(net.eval())  # net: an EDMPrecond, VPPrecond, … of NVlabs/edm
        sampler = FDivSampler(model, classifier)

    Args:
        net: ``net(x, sigma, class_labels)`` returning D (B, C, H, W) for x = x₀ + σ n (B, C, H, W), sigma (B,) float32
            and one-hot labels (B, label_dim) float32, or None where there are none. It is not copied, and its mode and
            precision stay as they are; in half precision it converts x itself, as EDM's own do.
        schedule: the discrete process that DDPM and DDIM sampling follow; any, as the network knows every σ.
        sigma_min, sigma_max: the noise levels to sample between, narrowed to ``net.sigma_min`` and ``net.sigma_max``.
        image_size, in_channels, label_dim: read off ``net.img_resolution``, ``net.img_channels`` and ``net.label_dim``
            if not given; label_dim 0 is an unconditional network.

    Returns:
        :class:`EDMModel`. The label ``label_dim`` stands for none (all zeros), so that a network which was trained with
        dropped labels goes with ``FDivSampler(…, cfg_scale=w, null_class=label_dim)``.

    Raises:
        TypeError, ValueError: a network that is not callable, an empty range of noise levels, a negative label_dim.

    Source: Karras et al., arXiv 2206.00364; the interface is that of NVlabs/edm.
    """
    label_dim = int(getattr(net, "label_dim", 0)) if label_dim is None else label_dim
    if label_dim < 0:
        raise ValueError(f"label_dim={label_dim!r} must be 0 or more")
    return EDMModel(
        net,
        schedule,
        max(sigma_min, float(getattr(net, "sigma_min", 0.0))),
        min(sigma_max, float(getattr(net, "sigma_max", math.inf))),
        getattr(net, "img_resolution", None) if image_size is None else image_size,
        getattr(net, "img_channels", None) if in_channels is None else in_channels,
        label_dim or None,
    )


class EDMModel(DenoiserModel):
    """What :func:`from_edm` returns."""

    def _denoised(self, x: Tensor, sigma: Tensor, y: Tensor | None, **kwargs: Any) -> Tensor:
        return self.net(x, sigma, None if y is None else self._one_hot(y), **kwargs)

    def _one_hot(self, y: Tensor) -> Tensor:
        if self.num_classes is None:
            raise ValueError("y was given, and the network is unconditional: its label_dim is 0")
        # by comparison: a label beyond the last gives zeros, which is no label, and no GPU is waited for
        return (y[:, None] == torch.arange(self.num_classes, device=y.device)).float()
