"""How a study of the demo's digits is measured: by the demo's judge, against digits for training."""

from __future__ import annotations

import torch
from torch import Tensor

from calguide_fast.demo import checkpoints
from calguide_fast.demo.data import load_split
from calguide_fast.generation.settings import file_hash
from calguide_fast.models.specs import LoadedClassifier
from calguide_fast.samples import to_uint8
from calguide_fast.studies.measure import Judge, Measure


class JudgeFeatures:
    """The judge's last hidden layer (N, 64) of (N, 1, 8, 8) uint8 images."""

    name = "the digits judge's last hidden layer"

    def __init__(self) -> None:
        self.judge = checkpoints.load_judge()

    def __call__(self, images: Tensor) -> Tensor:
        return self.judge.to(images.device).features(images.float() / 127.5 - 1)


def digits_measure(batch_size: int, device: torch.device) -> Measure:
    """Against the training digits: settings that a sweep chooses must not have been chosen by the test digits.

    Raises ImportError where scikit-learn, which holds the digits, is not installed.
    """
    train, _ = load_split()
    features = JudgeFeatures()
    name = f"digits judge {file_hash(checkpoints.ASSETS / f'{checkpoints.JUDGE}.safetensors')}"
    judge = Judge(LoadedClassifier(features.judge, "x0", None), name)
    reference = to_uint8(train.images).numpy()
    return Measure(reference, "1297 training digits", features, judge=judge, batch_size=batch_size, device=device)
