"""Sampling with one method and measuring what came out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from calguide_fast.demo import checkpoints
from calguide_fast.demo.data import CLASSES, Digits, few_labels, load_split
from calguide_fast.demo.methods import TERMS, Method
from calguide_fast.demo.networks import DigitClassifier
from calguide_fast.evaluation import frechet_distance, precision_recall
from calguide_fast.guidance import Guidance
from calguide_fast.models import UNet
from calguide_fast.sampler import FDivSampler, Step
from calguide_fast.samples import Samples

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

SEEDS_APART = 1_000_000  # between the first image seeds of two runs


class Lab:
    """The networks and the digits, loaded once."""

    def __init__(self, folder: Path = checkpoints.ASSETS):
        beta = checkpoints.SOFTPLUS_BETA
        self.unet: UNet = checkpoints.load_unet(folder)
        self.guides: dict[bool, DigitClassifier] = {
            twin: checkpoints.load_guide(folder, overconfident=twin, softplus_beta=beta) for twin in (False, True)
        }
        self.judge = checkpoints.load_judge(folder)
        self.train, self.test = load_split()
        self.train_features, self.test_features = self.features(self.train.images), self.features(self.test.images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The judge's features (N, 64) of images (N, 1, 8, 8)."""
        return self.judge.features(images)

    @torch.no_grad()
    def judged(self, images: Tensor) -> Tensor:
        """The class (N,) that the judge sees in images (N, 1, 8, 8)."""
        return self.judge(images).argmax(1)


@dataclass(frozen=True)
class Figures:
    """What was measured of one set of images."""

    frechet: float  # to the test digits
    frechet_train: float  # to the training digits; what strengths are chosen by
    precision: float
    recall: float
    accuracy: float  # share whose class is the one asked for, says the judge
    seconds: float
    images_per_second: float
    gradient_norm: float  # mean over steps and images, before the scale; 0 without guidance


def summarise(runs: Sequence[Row], statistic: Callable[[list[float]], float]) -> Row:
    """A statistic of each figure over several runs, which are dataclasses of numbers."""
    return type(runs[0])(*(statistic(list(values)) for values in zip(*map(astuple, runs), strict=True)))


def class_cycle(count: int) -> Tensor:
    """Labels 0, 1, …, 9, 0, 1, … (count,)."""
    return torch.arange(count) % CLASSES


def draw(
    lab: Lab, method: Method, run: int, count: int, steps: str, batch_size: int, guide: nn.Module | None = None
) -> tuple[Samples, float]:
    """`count` digits of all classes in turn, and the seconds it took. Every method gets the same seeds in one `run`.

    A method that guides does so by the classifier it names, or by `guide` if that is given.
    """
    settings = method.sampler_settings()
    if guide is None:
        guide = lab.guides[method.overconfident]
    classifier = None if settings["guidance"] is None else guide
    sampler = FDivSampler(lab.unet, classifier, num_classes=CLASSES, **settings)
    seeds = torch.arange(count) + run * SEEDS_APART
    start = time.perf_counter()
    samples = sampler.sample(class_cycle(count), seeds=seeds, steps=steps, batch_size=batch_size, progress=False)
    return samples, time.perf_counter() - start


def measure(lab: Lab, samples: Samples, seconds: float) -> Figures:
    """All figures of the samples, against the test digits."""
    assert samples.diagnostics is not None  # the sampler records them unless told not to
    norm = samples.diagnostics.gradient_norm.nanmean().nan_to_num().item()
    return _figures(lab, Digits(samples.images, samples.labels), seconds, norm)


def measure_real(lab: Lab, count: int) -> Figures:
    """The same figures of `count` training digits, or all there are: what a perfect sampler would get."""
    real = lab.train if count >= len(lab.train.labels) else few_labels(lab.train, count)
    return _figures(lab, real, seconds=0.0, norm=0.0)


def _figures(lab: Lab, digits: Digits, seconds: float, norm: float) -> Figures:
    features = lab.features(digits.images)
    manifold = precision_recall(lab.test_features, features, k=3)
    return Figures(
        frechet=frechet_distance(features, lab.test_features),
        frechet_train=frechet_distance(features, lab.train_features),
        precision=manifold.precision,
        recall=manifold.recall,
        accuracy=(lab.judged(digits.images) == digits.labels).double().mean().item(),
        seconds=seconds,
        images_per_second=len(digits.labels) / seconds if seconds else 0.0,
        gradient_norm=norm,
    )


@dataclass(frozen=True)
class GradientTrace:
    """Image-gradient norms of each term by itself along one and the same unguided trajectory."""

    timesteps: list[int]  # K of them, falling
    doubt: dict[str, list[float]]  # median over the images of 1 − p_y at τ=1, by classifier
    norms: dict[str, dict[str, list[list[float]]]]  # [classifier][term] -> K × (lower quartile, median, upper quartile)


def trace_gradients(
    lab: Lab,
    count: int,
    run: int,
    steps: str,
    classifiers: Mapping[str, nn.Module] | None = None,
    terms: Mapping[str, Guidance] = TERMS,
) -> GradientTrace:
    """Measure each term of the score at the x̂₀ that an unguided sampler passes through.

    The classifiers are those given by name, or else the guide and its overconfident twin.
    """
    labels = class_cycle(count)
    classifiers = classifiers or {"guide": lab.guides[False], "overconfident twin": lab.guides[True]}
    timesteps: list[int] = []
    doubt: dict[str, list[float]] = {name: [] for name in classifiers}
    norms: dict[str, dict[str, list[list[float]]]] = {name: {term: [] for term in terms} for name in classifiers}
    doubles = {name: copy.deepcopy(classifier).double() for name, classifier in classifiers.items()}
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)

    def watch(step: Step) -> None:
        assert step.x0 is not None  # classified at every step, as there is no interval
        timesteps.append(int(step.timestep))
        for name, classifier in doubles.items():
            for term, guidance in terms.items():
                # float64, for a gradient that vanishes is a small difference
                found = guidance.image_gradient(classifier, step.x0.double(), labels)
                norm = torch.linalg.vector_norm(found.gradient.flatten(1), dim=1)
                norms[name][term].append(norm.quantile(quartiles).tolist())
            assert found.stats is not None
            doubt[name].append(-found.stats.label_log_prob.expm1().median().item())

    # at scale 0 the sampler classifies, so that the callback sees x̂₀, yet nothing is pushed
    sampler = FDivSampler(lab.unet, lab.guides[False], guidance=Guidance("none", scale=0.0))
    sampler.sample(labels, seeds=torch.arange(count) + run * SEEDS_APART, steps=steps, progress=False, callback=watch)
    return GradientTrace(timesteps, doubt, norms)
