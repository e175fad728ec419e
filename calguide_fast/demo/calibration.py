"""Does a better calibrated classifier guide better? One that is overconfident, its repairs, and what each samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor, nn

from calguide_fast.calibration import TemperatureScaling, fine_tune, huber_ece, measure_calibration, top_label
from calguide_fast.demo.checkpoints import SOFTPLUS_BETA
from calguide_fast.demo.data import Digits, augment, few_labels
from calguide_fast.demo.experiment import Figures, GradientTrace, Lab, draw, measure, summarise, trace_gradients
from calguide_fast.demo.methods import METHODS, TERMS, Method
from calguide_fast.demo.train import OVERCONFIDENT, ClassifierRecipe, train_classifier
from calguide_fast.ops.smooth_ece import smooth_ece

BASE = "base"
CROSS_ENTROPY = "cross_entropy"
SMOOTH_ECE = "smooth_ece"
HUBER_ECE = "huber_ece"
TEMPERATURE = "temperature"
ARMS = {
    BASE: "Overconfident",
    CROSS_ENTROPY: "Fine-tuned, cross-entropy alone",
    SMOOTH_ECE: "Fine-tuned, + smooth ECE",
    HUBER_ECE: "Fine-tuned, + Huber ECE",
    TEMPERATURE: "Temperature scaling",
}
# cross-entropy alone is the control: the same epochs on the same images, and no calibration loss
LOSSES: dict[str, str | None] = {CROSS_ENTROPY: None, SMOOTH_ECE: "smooth_ece", HUBER_ECE: "huber_ece"}

# the same three scales for every arm, wide enough for the base's large gradients and the small ones of its repairs
_SCALES = {"adm_g": (0.5, 2.0, 8.0), "elucd": (0.1, 0.2, 0.4), "js": (0.1, 0.2, 0.4)}
GUIDED = tuple(replace(method, strengths=_SCALES[method.name]) for method in METHODS if method.name in _SCALES)
TRACED = "log p, τ₂=1"


@dataclass(frozen=True)
class CalibrationPlan:
    """How much is trained and sampled. The splits are parts of the training digits and have no digit in common."""

    # the network that is calibrated is the one that guides, so that it has the guides' activation from the start
    recipe: ClassifierRecipe = replace(OVERCONFIDENT, softplus_beta=SOFTPLUS_BETA)
    seeds: int = 3  # base classifiers
    calibration_labels: int = 300  # new to the base: for its temperature, and beside its own digits for fine-tuning
    validation_labels: int = 600  # that hyper-parameters are chosen on
    epochs: int = 30  # of fine-tuning
    fine_tuning_batch: int = 300  # a calibration loss sees nothing in a few samples
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    loss_weights: tuple[float, ...] = (0.5, 2.0)
    methods: tuple[Method, ...] = GUIDED  # and the scales of each
    images: int = 200  # of each arm, base classifier, guidance and scale
    steps: str = "25"
    batch_size: int = 200
    traced: int = 100  # images whose gradients are traced


@dataclass(frozen=True)
class HeldOut:
    """A classifier's calibration on the test digits, top label."""

    smooth_ece: float
    by_chance: float  # what the smooth ECE would be were the confidences true
    huber_ece: float
    accuracy: float
    cross_entropy: float  # nats
    confidence: float


@dataclass(frozen=True)
class Tuning:
    """What one setting of a fine-tuning reached on the validation digits, mean over the base classifiers."""

    learning_rate: float
    loss_weight: float
    smooth_ece: float
    accuracy: float
    cross_entropy: float


@dataclass(frozen=True)
class Guided:
    """What one arm sampled under one guidance at one scale: one run for each base classifier."""

    arm: str
    method: str
    scale: float
    runs: list[Figures]


@dataclass(frozen=True)
class Study:
    """All that was measured, by arm."""

    plan: CalibrationPlan
    sweep: dict[str, list[Tuning]]  # of the arms that are fine-tuned
    chosen: dict[str, Tuning]
    temperatures: list[float]  # one for each base classifier
    held_out: dict[str, list[HeldOut]]
    guided: list[Guided]
    trace: GradientTrace  # of the first base classifier and its repairs
    logits: dict[str, Tensor]  # (500, 10) of the test digits, by the same classifiers
    seconds: float


def study_calibration(lab: Lab, plan: CalibrationPlan, pool: Executor, say: Callable[..., None]) -> Study:
    """Train overconfident classifiers, repair each in every way, measure all on the test digits, and let them guide.

    The test digits choose nothing: learning rates and loss weights have the lowest smooth ECE on the validation
    digits, temperatures the lowest cross-entropy on the calibration digits. Fine-tuning sees these and the base's own,
    augmented, so that it forgets none.
    """
    start = time.perf_counter()
    # fine-tunings in several threads put back each other's random states, not the caller's
    with torch.random.fork_rng(devices=[]):
        recipes = [replace(plan.recipe, seed=seed) for seed in range(plan.seeds)]
        bases: list[nn.Module] = [
            *pool.map(lambda recipe: train_classifier(lab.train, recipe, "base", progress=False), recipes)
        ]
        sweep, arms = _fine_tuned(lab, bases, plan, pool)
    calibration = few_labels(lab.train, plan.calibration_labels, skip=plan.recipe.labels)
    scalings = [TemperatureScaling().fit(_logits(base, calibration), calibration.labels) for base in bases]
    arms[BASE] = bases
    arms[TEMPERATURE] = [scaling.wrap(base) for scaling, base in zip(scalings, bases, strict=True)]
    arms = {arm: [classifier.eval().requires_grad_(False) for classifier in arms[arm]] for arm in ARMS}

    held_out = {arm: [measure_held_out(classifier, lab.test) for classifier in arms[arm]] for arm in ARMS}
    for arm, title in ARMS.items():
        found = summarise(held_out[arm], mean)
        say(f"{title:32} smooth ECE {found.smooth_ece:.4f}  accuracy {found.accuracy:.1%}")
    first = {title: arms[arm][0] for arm, title in ARMS.items()}
    tracing = pool.submit(trace_gradients, lab, plan.traced, 0, plan.steps, first, {TRACED: TERMS[TRACED]})
    guided = _guided(lab, arms, plan, pool, say)
    return Study(
        plan,
        sweep,
        {arm: _best(points) for arm, points in sweep.items()},
        [scaling.temperature.item() for scaling in scalings],
        held_out,
        guided,
        tracing.result(),
        {arm: _logits(arms[arm][0], lab.test) for arm in ARMS},
        time.perf_counter() - start,
    )


def measure_held_out(classifier: nn.Module, digits: Digits) -> HeldOut:
    """All figures of a classifier on digits that it has not seen."""
    logits = _logits(classifier, digits)
    found = measure_calibration(logits, digits.labels)
    confidence, correct = top_label(logits, digits.labels)
    return HeldOut(
        found.smooth_ece,
        smooth_ece_by_chance(confidence),
        huber_ece(confidence, correct).item(),
        found.accuracy,
        found.cross_entropy,
        found.confidence,
    )


def smooth_ece_by_chance(confidence: Tensor, draws: int = 200) -> float:
    """The mean smooth ECE of confidences (n,) that are true: of n samples it is not 0, and below it nothing is told."""
    generator = torch.Generator().manual_seed(0)
    outcomes = torch.rand(draws, len(confidence), generator=generator) < confidence
    return mean(smooth_ece(confidence, outcome).value.item() for outcome in outcomes)


def best_scale(guided: Sequence[Guided]) -> Guided:
    """Of one arm's scales under one guidance, the one whose samples are the nearest to the *training* digits."""
    return min(guided, key=lambda point: mean(figures.frechet_train for figures in point.runs))


class FreshlyAugmented:
    """Batches of digits, shuffled and augmented anew at every pass: the same passes for the same seed."""

    def __init__(self, digits: Digits, batch_size: int, seed: int):
        self.digits, self.batch_size = digits, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits.labels), generator=self.generator)
        for chosen in order.split(self.batch_size):
            yield augment(self.digits.images[chosen], self.generator), self.digits.labels[chosen]


def _fine_tuned(
    lab: Lab, bases: Sequence[nn.Module], plan: CalibrationPlan, pool: Executor
) -> tuple[dict[str, list[Tuning]], dict[str, list[nn.Module]]]:
    """Every setting on the validation digits, and for each arm the classifiers of its best one."""
    seen = plan.recipe.labels + plan.calibration_labels
    known, validation = few_labels(lab.train, seen), few_labels(lab.train, plan.validation_labels, skip=seen)

    def tuned(job: tuple[str, float, float, int]) -> nn.Module:
        arm, learning_rate, loss_weight, seed = job
        classifier = copy.deepcopy(bases[seed])
        images = FreshlyAugmented(known, plan.fine_tuning_batch, seed)
        fine_tune(classifier, images, LOSSES[arm], loss_weight, plan.epochs, lr=learning_rate)
        return classifier

    settings = [
        (arm, learning_rate, loss_weight)
        for arm, loss in LOSSES.items()
        for learning_rate in plan.learning_rates
        for loss_weight in (plan.loss_weights if loss else (0.0,))
    ]
    seeds = range(len(bases))
    classifiers = pool.map(tuned, [(*setting, seed) for setting in settings for seed in seeds])
    sweep: dict[str, list[Tuning]] = {arm: [] for arm in LOSSES}
    by_setting: dict[tuple[str, Tuning], list[nn.Module]] = {}
    for arm, learning_rate, loss_weight in settings:
        group = [next(classifiers) for _ in seeds]
        figures = [measure_calibration(_logits(each, validation), validation.labels) for each in group]
        smooth, accuracy, entropy = (
            mean(getattr(found, name) for found in figures) for name in ("smooth_ece", "accuracy", "cross_entropy")
        )
        point = Tuning(learning_rate, loss_weight, smooth, accuracy, entropy)
        sweep[arm].append(point)
        by_setting[arm, point] = group
    return sweep, {arm: by_setting[arm, _best(points)] for arm, points in sweep.items()}


def _best(points: Sequence[Tuning]) -> Tuning:
    return min(points, key=lambda point: point.smooth_ece)


def _guided(
    lab: Lab,
    arms: Mapping[str, Sequence[nn.Module]],
    plan: CalibrationPlan,
    pool: Executor,
    say: Callable[..., None],
) -> list[Guided]:
    """What each arm's classifiers sample at every scale; the n-th of every arm has the same noise and labels."""

    def sample(job: tuple[nn.Module, Method, int]) -> Figures:
        classifier, method, run = job
        return measure(lab, *draw(lab, method, run, plan.images, plan.steps, plan.batch_size, classifier))

    points = [(arm, method.at(scale)) for method in plan.methods for arm in arms for scale in method.strengths]
    runs = pool.map(
        sample,
        [(classifier, method, run) for arm, method in points for run, classifier in enumerate(arms[arm])],
    )
    guided = []
    for arm, method in points:
        assert method.strength is not None
        guided.append(Guided(arm, method.name, method.strength, [next(runs) for _ in range(plan.seeds)]))
        distance = mean(figures.frechet for figures in guided[-1].runs)
        say(f"{ARMS[arm]:32} {method.title:15} {method.strength:4g}: Fréchet {distance:.2f}")
    return guided


@torch.no_grad()
def _logits(classifier: nn.Module, digits: Digits) -> Tensor:
    return classifier(digits.images)
