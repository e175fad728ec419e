"""Samples: what a sampler returns, and how it is saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calguide_fast.guidance import ImageGradient
from calguide_fast.karras import KarrasLevels
from calguide_fast.schedule import Timeline
from calguide_fast.summary import summary

if TYPE_CHECKING:
    from PIL import Image
from calguide_fast.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What guidance did at each of K steps, in order of use, to each of N images; NaN where it was off.

    Where a step evaluates the model more than once, this is of the first time; where it is repeated, of the last.

    Attributes:
        timesteps: (K,) the original timesteps, falling: int64, or float64 for the methods in EDM's scaling.
        sigmas: (K,) noise levels before each step.
        values: (K, 4, N), the four tables below in one, so that a step is written at once.
        gradient_norm: (K, N) L2 norm of the image gradient, before scale and tilt.
        entropy: (K, N) of the classifier's softmax at temperature 1, nats.
        label_log_prob: (K, N) log softmax(f)_y at temperature 1.
        tilt_weight: (K, N) the tilt's weights; 1 without tilt.
    """

    timesteps: Tensor
    sigmas: Tensor
    values: Tensor

    __repr__ = summary

    @property
    def gradient_norm(self) -> Tensor:
        return self.values[:, 0]

    @property
    def entropy(self) -> Tensor:
        return self.values[:, 1]

    @property
    def label_log_prob(self) -> Tensor:
        return self.values[:, 2]

    @property
    def tilt_weight(self) -> Tensor:
        return self.values[:, 3]

    @classmethod
    def empty(cls, timeline: Timeline | KarrasLevels, count: int, device: torch.device) -> Diagnostics:
        values = torch.full((len(timeline), 4, count), math.nan, dtype=torch.float32, device=device)
        timesteps, sigmas = (torch.from_numpy(table[::-1].copy()) for table in (timeline.timesteps, timeline.sigmas))
        return cls(timesteps, sigmas, values)

    @staticmethod
    def of_step(found: ImageGradient, tilt_weight: Tensor | None) -> Tensor:
        """What one step did to B images: (4, B), without waiting for the device."""
        gradient = found.gradient
        norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)), dtype=torch.float32)
        if found.stats is None:
            entropy = label_log_prob = torch.full_like(norm, math.nan)
        else:
            entropy, label_log_prob = found.stats.entropy, found.stats.label_log_prob
        weight = torch.ones_like(norm) if tilt_weight is None else tilt_weight
        return torch.stack([norm, entropy, label_log_prob, weight])


@dataclass(frozen=True, eq=False)
class Samples:
    """N generated images.

    Attributes:
        images: (N, C, *spatial) float32, nominally in [−1, 1], on the sampler's device.
        labels: (N,) int64 on the CPU.
        seeds: (N,) int64 on the CPU, bit patterns of unsigned 64-bit seeds.
        batch_size: images that were sampled, and tilted, together: consecutive groups of this many.
        diagnostics: what guidance did, if it was recorded.
        trajectory: some of the steps, if they were kept.
    """

    images: Tensor
    labels: Tensor
    seeds: Tensor
    batch_size: int
    diagnostics: Diagnostics | None = None
    trajectory: Trajectory | None = None

    __repr__ = summary

    def __len__(self) -> int:
        return len(self.images)

    def to_uint8(self) -> Tensor:
        """(N, H, W, C) uint8 on the CPU, as :func:`to_uint8` makes them."""
        return to_uint8(self.images)

    def save_npz(self, path: str | Path) -> Path:
        """Write what OpenAI's evaluator reads, ``arr_0`` the uint8 images and ``arr_1`` the labels; and the seeds.

        The file also holds ``seeds`` and ``batch_size``, which reproduce the images.

        Args:
            path: a file, or an existing folder, in which the file is named ``samples_NxHxWxC.npz``.

        Returns:
            The file written.
        """
        pixels = self.to_uint8().numpy()
        path = Path(path)
        if path.is_dir():
            path = path / f"samples_{'x'.join(map(str, pixels.shape))}.npz"
        # an open file, because numpy would add a suffix to a name
        with path.open("wb") as file:
            np.savez(file, pixels, self.labels.numpy(), seeds=self.seeds.numpy(), batch_size=self.batch_size)
        return path

    def save_grid(self, path: str | Path, columns: int | None = None, zoom: int = 1) -> Path:
        """Write the images as one picture, row by row.

        Args:
            path: of the picture; the suffix chooses the format.
            columns: images in a row; about the square root of N if None.
            zoom: pixels in the picture for one of the image.

        Raises:
            ValueError: the images are not 2-D with 1 or 3 channels, or there are none; columns or zoom is below 1.
        """
        path = Path(path)
        image_grid(self.to_uint8(), columns, zoom).save(path)
        return path


def to_uint8(images: Tensor) -> Tensor:
    """(N, H, W, C) uint8 on the CPU: ((x + 1)·127.5), clipped to 0..255 and truncated, as OpenAI's samplers do."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous().cpu()


def image_grid(pixels: Tensor, columns: int | None = None, zoom: int = 1) -> Image.Image:
    """One picture of (N, H, W, 1 or 3) uint8 images, row by row, with a thin gap between them."""
    # a fifth of the package's own time to import, which who draws no pictures does without
    from PIL import Image

    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or len(pixels) == 0:
        raise ValueError(f"a grid needs images of shape (N >= 1, H, W, 1 or 3), got {tuple(pixels.shape)}")
    for name, value in (("columns", columns), ("zoom", zoom)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)
    tiles = pixels.new_full((rows * columns, height + 1, width + 1, channels), 255)
    tiles[:count, :height, :width] = pixels
    grid = (
        tiles.unflatten(0, (rows, columns))
        .transpose(1, 2)
        .reshape(rows * (height + 1), columns * (width + 1), channels)
    )
    picture = Image.fromarray(grid[:-1, :-1].squeeze(-1).numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
