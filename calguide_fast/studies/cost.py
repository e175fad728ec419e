"""What sampling costs, counted on networks that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calguide_fast import models
from calguide_fast.models.specs import RESNETS


class NetworkCost(NamedTuple):
    """Of one network and one image."""

    parameters: int
    flops: int  # two for each multiply-add of convolutions, matrix products and attention; all else is left out


@cache
def unet_cost(preset: str) -> NetworkCost:
    """One evaluation of a preset's UNet."""
    with torch.device("meta"):
        unet = models.adm_unet(preset).eval().requires_grad_(False)
        x, t = _image(preset), torch.zeros(1, dtype=torch.long)
        y = torch.zeros(1, dtype=torch.long)
        return NetworkCost(parameters(unet), flops(lambda: unet(x, t, y) if unet.class_conditional else unet(x, t)))


@cache
def classifier_cost(name: str, preset: str) -> NetworkCost:
    """Logits and the gradient with respect to the image, of an ADM classifier or a ResNet of 1000 classes.

    Args:
        name: of `models.specs.CLASSIFIERS`.
        preset: whose images it sees.
    """
    with torch.device("meta"):
        noise_aware = name in models.PRESETS
        module: nn.Module = models.adm_classifier(name) if noise_aware else RESNETS[name](num_classes=1000)
        module.eval().requires_grad_(False)
        x, t = _image(preset).requires_grad_(), torch.zeros(1, dtype=torch.long)

        def classify() -> None:
            logits = module(x, t) if noise_aware else module(x)
            # the counter's hooks know no autograd.grad with respect to a leaf
            logits.sum().backward()

        return NetworkCost(parameters(module), flops(classify))


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all that `work` computes."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    """How many numbers a network has learned."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_shape(preset: str) -> tuple[int, int, int]:
    """(C, H, W)."""
    size = models.PRESETS[preset].image_size
    return 3, size, size


def _image(preset: str) -> Tensor:
    return torch.zeros(1, *image_shape(preset))
