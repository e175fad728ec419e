"""Calibration against noise level: how sure, and how right, a classifier is along the diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calguide_fast.calibration.predictions import measure_calibration
from calguide_fast.classifiers import Classifier, as_single
from calguide_fast.networks import check_callable
from calguide_fast.noise import as_seeds
from calguide_fast.ops import checks
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.step import predict_x0
from calguide_fast.schedule import Schedule, spaced_timesteps


class NoiseLevelCalibration(NamedTuple):
    """A classifier's calibration at K noise levels, rising; tensors (K,), float64 but the timesteps, on the CPU."""

    timesteps: Tensor  # int64
    sigmas: Tensor  # √((1−ᾱ)/ᾱ): noise per unit of signal
    smooth_ece: Tensor
    accuracy: Tensor
    confidence: Tensor  # mean probability of the top label
    cross_entropy: Tensor  # nats


class Noising:
    """Images at K noise levels, x_t = √ᾱ_t x + √(1−ᾱ_t) ε; an image meets the same ε at each.

    Args:
        schedule: of ᾱ.
        timesteps: the levels.
        seed: of the noise, which depends on the image's index and the draw alone.
    """

    def __init__(self, schedule: Schedule, timesteps: Sequence[int], seed: int = 0) -> None:
        self.timesteps, self.seed = list(timesteps), seed
        self.bars = schedule.alphas_cumprod[self.timesteps].tolist()

    def __call__(self, x: Tensor, first: int, draw: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(t, x_t) at each level for float32 images x (B, …), of which the first has the index `first`."""
        seeds = as_seeds([(self.seed << 32) + index for index in range(first, first + len(x))], len(x)).to(x.device)
        noise = sampling_noise(seeds, tuple(x.shape[1:]), draw)
        for timestep, bar in zip(self.timesteps, self.bars):
            t = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
            yield t, math.sqrt(bar) * x + math.sqrt(1 - bar) * noise


@torch.inference_mode(False)
@torch.no_grad()
def calibration_by_noise_level(
    classifier: Classifier,
    model: Callable[..., Tensor] | None,
    images: Tensor,
    labels: Tensor,
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor = "linear",
    timesteps: int | Sequence[int] = 20,
    input: str | None = None,
    *,
    repeats: int = 1,
    batch_size: int = 256,
    class_conditional: bool | None = None,
    null_class: int | None = None,
    clip_denoised: bool = True,
    classifier_transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> NoiseLevelCalibration:
    """Smooth ECE, accuracy and confidence of what a classifier sees while it guides.

    Images are noised to each timestep, x_t = √ᾱ_t x + √(1−ᾱ_t) ε. An off-the-shelf classifier (``input="x0"``) then
    sees the x̂₀ that the model predicts of it, as in guidance, or x_t itself where there is no model; a noise-aware
    one (``input="xt"``) sees (x_t, t). An image meets the same ε at every timestep.

    Args:
        classifier: ``classifier(x0)`` or, for ``input="xt"``, ``classifier(x_t, t)``; returns logits (B, num_classes).
            Or what :func:`calguide_fast.models.load_classifier` returns.
        model: as :class:`calguide_fast.FDivSampler` takes it, ε̂ (B, C, …) or ε̂ and v (B, 2C, …); None for
            ``input="xt"``, or to show a classifier of clean images what noise alone does to it.
        images: (N, C, *spatial) clean images in [−1, 1], on the classifier's device. Held-out ones, which neither
            network was trained on.
        labels: (N,) integers.
        schedule: as :meth:`calguide_fast.schedule.Schedule.of`; the model's or the noise-aware classifier's own.
        timesteps: which, or how many, evenly spaced from first to last.
        input: ``"x0"`` or ``"xt"``; if not given, what a loaded classifier looks at, or ``"x0"``.
        repeats: draws of noise for each image, whose predictions are measured together.
        batch_size: images at a time.
        class_conditional: whether the model takes ``y``; read off ``model.class_conditional`` if not given.
        null_class: the label that makes the model unconditional. Without it a class-conditional model is given the
            true labels, as in guidance, and what it knows of them shows in x̂₀.
        clip_denoised: clip x̂₀ to [−1, 1].
        classifier_transform: applied to x̂₀ before the classifier.
        seed: of the noise, which depends on the image's index and the draw alone.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range, a model with ``input="xt"``, or a network in
            training mode.
    """
    schedule = Schedule.of(schedule)
    chosen = _timesteps(timesteps, schedule.num_timesteps)
    for name, value in (("repeats", repeats), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    network, input = as_single(classifier, input, "input")
    if model is not None:
        check_callable("model", model)
    if input == "xt" and model is not None:
        raise ValueError("a classifier of (x_t, t) needs no model: give model=None with input='xt'")
    for name, one in (("model", model), ("classifier", network)):
        if getattr(one, "training", False):
            raise ValueError(f"the {name} is in training mode; call {name}.eval() first")
    checks.floating("images", images)
    if images.ndim < 3 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (N, C, *spatial) with N at least 1")
    checks.shaped("labels", labels, tuple(images.shape[:1]))
    checks.same_device("labels", labels, "images", images)
    if class_conditional is None:
        class_conditional = bool(getattr(model, "class_conditional", False))

    coefficients = schedule.respaced(schedule.num_timesteps).coefficients().to(images.device)
    shown_labels = labels if null_class is None else torch.full_like(labels, null_class)
    noising = Noising(schedule, chosen, seed)

    logits: list[list[Tensor]] = [[] for _ in chosen]
    for draw in range(repeats):
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            for timestep, (t, x_t), found in zip(chosen, noising(images[batch].float(), start, draw), logits):
                if input == "xt":
                    found.append(network(x_t, t))
                    continue
                if model is not None:
                    output = model(x_t, t, y=shown_labels[batch]) if class_conditional else model(x_t, t)
                    x_t = predict_x0(x_t, output, coefficients[timestep], clip_denoised)
                found.append(network(x_t if classifier_transform is None else classifier_transform(x_t)))
    return measure_by_noise_level([torch.cat(found) for found in logits], labels.repeat(repeats), schedule, chosen)


def measure_by_noise_level(
    logits: Sequence[Tensor],
    labels: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    bandwidth: float | None = None,
) -> NoiseLevelCalibration:
    """Calibration of logits (n, num_classes) at each of K timesteps; labels (n,); bandwidth: of the smooth ECE."""
    measured = [measure_calibration(found, labels, bandwidth) for found in logits]
    figures = torch.tensor(
        [(m.smooth_ece, m.accuracy, m.confidence, m.cross_entropy) for m in measured], dtype=torch.float64, device="cpu"
    )
    sigmas = schedule.respaced(schedule.num_timesteps).sigmas[list(timesteps)]
    return NoiseLevelCalibration(torch.tensor(timesteps, device="cpu"), torch.from_numpy(sigmas), *figures.unbind(1))


def _timesteps(timesteps: int | Sequence[int], count: int) -> list[int]:
    if isinstance(timesteps, int):
        return spaced_timesteps(count, int(timesteps))
    chosen = sorted(set(map(int, timesteps)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"timesteps={timesteps!r} must be a count, or timesteps in 0..{count - 1}")
    return chosen
