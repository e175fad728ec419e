"""Scikit-learn's 1,797 handwritten digits (8×8), split once and for all."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = 10
IMAGE_SIZE = 8
TEST_SIZE = 500


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) in [−1, 1], fp32, and their labels (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor


def load_split() -> tuple[Digits, Digits]:
    """The 1297 training and 500 test digits: the same ones at every call, classes in equal shares.

    Raises ImportError when scikit-learn, which holds the data, is not installed.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE) / 8 - 1  # 0..16 to −1..1
    labels = torch.from_numpy(targets).long()

    # RandomState's streams are frozen for good by numpy's policy, a Generator's are not
    order = np.random.RandomState(0).permutation(len(labels))
    rank = np.empty(len(labels))
    for digit in range(CLASSES):
        members = order[targets[order] == digit]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    # the lowest ranks of every class together are a test set with each class in its share
    chosen = np.lexsort((order, rank))
    test, train = np.sort(chosen[:TEST_SIZE]), chosen[TEST_SIZE:]
    train = train[np.random.RandomState(1).permutation(len(train))]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def few_labels(digits: Digits, count: int, skip: int = 0) -> Digits:
    """The first `count` digits after the first `skip`, a tenth of either from each class.

    The first 300 are what the guide classifiers are trained on.
    """
    own = slice(skip // CLASSES, (skip + count) // CLASSES)
    kept = torch.cat([torch.nonzero(digits.labels == digit)[own, 0] for digit in range(CLASSES)])
    return Digits(digits.images[kept], digits.labels[kept])


def augment(images: torch.Tensor, generator: torch.Generator, noise: float = 0.0) -> torch.Tensor:
    """Turn, resize and move images (N, 1, 8, 8) a little, each its own way; add Gaussian noise up to `noise`.

    Turns reach ±12°, sizes ±10 %, moves ±0.8 pixel: what a hand does. Each image draws its own noise level.
    """
    count, size = len(images), images.shape[-1]

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, zoom, move_x, move_y = uniform(math.radians(12)), 1 + uniform(0.1), uniform(0.8), uniform(0.8)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [cos, -sin, 2 * move_x / size, sin, cos, 2 * move_y / size]
    grid = F.affine_grid(torch.stack(rows, 1).reshape(count, 2, 3), list(images.shape), align_corners=False)
    # grid_sample pads with 0: the background −1 is moved there and back
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    level = noise * torch.rand(count, 1, 1, 1, generator=generator)
    return moved + level * torch.randn(moved.shape, generator=generator)
