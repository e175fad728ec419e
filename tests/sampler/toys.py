"""Tiny networks with the interfaces that the sampler expects, smooth so that rounding stays rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ToyUNet(nn.Module):
    """ε̂, or ε̂ and v, from two convolutions, the time and, if class-conditional, the label."""

    def __init__(self, learned_variance: bool = True, num_classes: int | None = None, image_size: int = 6) -> None:
        super().__init__()
        self.in_channels, self.image_size, self.num_classes = 3, image_size, num_classes
        self.class_conditional = num_classes is not None
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(2, 8)
        self.label = nn.Embedding(num_classes + 1, 8) if num_classes is not None else None
        self.last = nn.Conv2d(8, 6 if learned_variance else 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, shift: float = 0.0) -> Tensor:
        assert t.dtype in (torch.int64, torch.float32, torch.float64) and t.shape == (len(x),)
        t = t.to(x.dtype)[:, None] / 1000
        h = self.first(x) + self.time(torch.cat([t, (5 * t).cos()], 1))[..., None, None]
        if self.label is not None:
            h = h + self.label(y)[..., None, None]
        return self.last(torch.tanh(h)) + shift


class ToyClassifier(nn.Module):
    """Logits of five classes; of a noisy image where a time is given."""

    def __init__(self, timed: bool = False, sharpness: float = 6.0) -> None:
        super().__init__()
        self.num_classes, self.sharpness = 5, sharpness
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(1, 8) if timed else None
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        if self.time is not None:
            h = h + self.time(t.to(x.dtype)[:, None] / 1000)[..., None, None]
        return self.sharpness * self.head(torch.tanh(h).mean((2, 3)))


def unet(**options) -> ToyUNet:
    torch.manual_seed(1)
    return ToyUNet(**options).eval()


def classifier(**options) -> ToyClassifier:
    torch.manual_seed(2)
    return ToyClassifier(**options).eval()
