"""The demo's three kinds of network, small enough to train on a CPU while one waits."""

from __future__ import annotations

import torch
from torch import nn

from calguide_fast.demo.data import CLASSES, IMAGE_SIZE
from calguide_fast.models import UNet

NULL_CLASS = CLASSES  # the label that stands for "no label"
FEATURES = 64


def digit_unet() -> UNet:
    """ADM's UNet for 8×8 digits: 10 classes and a null class, ε and v out, 757k parameters."""
    return UNet(
        image_size=IMAGE_SIZE,
        in_channels=1,
        model_channels=32,
        out_channels=2,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=CLASSES + 1,
        num_heads=4,
        use_scale_shift_norm=True,
    )


class DigitClassifier(nn.Module):
    """Logits (N, 10) of images (N, 1, 8, 8): three convolutions and a linear layer.

    `softplus_beta` swaps ReLU for Softplus, whose gradient is smooth, as EluCD does when it samples; None keeps ReLU.
    """

    def __init__(self, width: int = 24, features: int = FEATURES, softplus_beta: float | None = None):
        super().__init__()
        self.num_classes = CLASSES

        def activation() -> nn.Module:
            return nn.ReLU() if softplus_beta is None else nn.Softplus(beta=softplus_beta)

        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            activation(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (IMAGE_SIZE // 4) ** 2, features),
            activation(),
        )
        self.head = nn.Linear(features, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer (N, features) of images (N, 1, 8, 8)."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))
