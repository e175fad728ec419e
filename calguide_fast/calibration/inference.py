"""A classifier run over labelled images, clean or noised: its logits, and files of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from calguide_fast.calibration.images import LabelledImages
from calguide_fast.calibration.noise_level import Noising
from calguide_fast.calibration.predictions import check_predictions
from calguide_fast.models import PRESETS, LoadedClassifier
from calguide_fast.schedule import Schedule, spaced_timesteps

PREPROCESSING = ("minus-one-one", "imagenet")
# of the images' red, green and blue in 0..1, as torchvision's classifiers were trained
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timesteps that a noise-aware classifier is measured at unless told
DEFAULT_LEVELS = 10


class Classified(NamedTuple):
    """What a classifier said of n images at K noise levels, or of the images as they are (K = 1); on the CPU."""

    logits: Tensor  # (K, n, num_classes)
    labels: Tensor  # (n,) int64
    timesteps: list[int]  # K of them; none for clean images

    def save(self, path: Path) -> None:
        """Write ``logits`` (K·n, num_classes), ``labels`` and, of noised images, ``timesteps``, each (K·n,)."""
        arrays: dict[str, Any] = {
            "logits": self.logits.flatten(0, 1).numpy(),
            "labels": self.labels.repeat(len(self.logits)).numpy(),
        }
        if self.timesteps:
            arrays["timesteps"] = np.repeat(self.timesteps, len(self.labels))
        path.parent.mkdir(parents=True, exist_ok=True)
        # an open file, because numpy would add a suffix to a name
        with path.open("wb") as file:
            np.savez(file, **arrays)


@dataclass(frozen=True)
class Inference:
    """How a classifier is shown images.

    Attributes:
        classifier: as :func:`calguide_fast.models.load_classifier` gives it.
        preprocess: ``"minus-one-one"`` shows it pixels scaled to [−1, 1], as guidance does; ``"imagenet"`` takes
            torchvision's mean and standard deviation of the channels off.
        timesteps: noise the images to each, x_t = √ᾱ_t x + √(1−ᾱ_t) ε, on the schedule of the classifier's preset
            (linear for a ResNet). Empty: clean images, or for a noise-aware classifier, which knows none, ten levels.
        batch_size: images at a time.
        device: to run on.

    Raises:
        ValueError: a setting out of range, or ``"imagenet"`` for a noise-aware classifier.
    """

    classifier: LoadedClassifier
    preprocess: str = "minus-one-one"
    timesteps: Sequence[int] = ()
    batch_size: int = 64
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.preprocess not in PREPROCESSING:
            raise ValueError(f"preprocess={self.preprocess!r} must be {' or '.join(map(repr, PREPROCESSING))}")
        if self.noise_aware and self.preprocess != "minus-one-one":
            raise ValueError(f"preprocess={self.preprocess!r} is not for a noise-aware classifier, which knows [-1, 1]")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be positive")
        last = self.schedule.num_timesteps - 1
        if any(not 0 <= t <= last for t in self.timesteps):
            raise ValueError(f"timesteps={list(self.timesteps)} must lie in 0..{last}")

    @property
    def noise_aware(self) -> bool:
        return self.classifier.classifier_input == "xt"

    @property
    def schedule(self) -> Schedule:
        preset = self.classifier.preset
        return Schedule.of("linear" if preset is None else PRESETS[preset].schedule)

    @torch.no_grad()
    def classify(self, data: LabelledImages, progress: bool = False) -> Classified:
        """The logits of all images; `progress` shows a bar on stderr.

        Raises:
            ValueError: as ``data.batches``; another number of class folders than of classes; labels out of range.
        """
        module = self.classifier.module.to(self.device)
        classes = getattr(module, "num_classes", None)
        if None not in (classes, data.num_classes) and classes != data.num_classes:
            raise ValueError(
                f"the data have {data.num_classes} class folders and the classifier {classes} classes: there must be a "
                "folder for each class, as their places are the labels"
            )
        timesteps = sorted(set(self.timesteps))
        if self.noise_aware and not timesteps:
            timesteps = spaced_timesteps(self.schedule.num_timesteps, DEFAULT_LEVELS)
        noising = Noising(self.schedule, timesteps)
        found: list[list[Tensor]] = [[] for _ in timesteps or [0]]
        labels: list[Tensor] = []
        first = 0
        with tqdm(total=len(data), unit="image", desc="classifying", disable=not progress) as bar:
            for batch in data.batches(self.batch_size):
                x = torch.tensor(batch.images, device=self.device).movedim(-1, 1).float() / 127.5 - 1
                labels.append(torch.from_numpy(batch.labels))
                shown = noising(x, first) if timesteps else [(None, x)]
                for (t, x_t), level in zip(shown, found):
                    logits = module(x_t, t) if self.noise_aware else module(self._preprocessed(x_t))
                    level.append(logits.float().cpu())
                check_predictions(found[0][-1], labels[-1])
                first += len(x)
                bar.update(len(x))
        return Classified(torch.stack([torch.cat(level) for level in found]), torch.cat(labels), timesteps)

    def _preprocessed(self, x: Tensor) -> Tensor:
        if self.preprocess == "minus-one-one":
            return x
        if x.shape[1] != 3:
            raise ValueError(f"preprocess='imagenet' wants 3 channels, and the images have {x.shape[1]}")
        mean, std = (x.new_tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        return ((x + 1) / 2 - mean) / std
