"""Training of the demo's networks: a diffusion model, two classifiers that guide and one that judges."""

from __future__ import annotations

import json
import math
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange

from calguide_fast.demo import checkpoints
from calguide_fast.demo.data import Digits, augment, few_labels, load_split
from calguide_fast.demo.networks import NULL_CLASS, DigitClassifier, digit_unet
from calguide_fast.demo.threads import one_thread
from calguide_fast.ops.coefficients import Coefficient
from calguide_fast.schedule import Schedule


@dataclass(frozen=True)
class DiffusionRecipe:
    """How the diffusion model is trained."""

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 1.5e-3  # falls to 0 along a cosine
    ema: float = 0.995
    label_dropout: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained."""

    labels: int  # training digits it sees
    epochs: int
    learning_rate: float  # the peak of a one-cycle schedule
    weight_decay: float
    augment: bool
    noise: float  # largest standard deviation of the noise added
    width: int = 24
    batch_size: int = 100
    seed: int = 0
    softplus_beta: float | None = None  # None for ReLU


# layers draw their first weights from one stream that all threads share
_INITIALISING = threading.Lock()

UNET = DiffusionRecipe()
GUIDE = ClassifierRecipe(300, epochs=400, learning_rate=5e-3, weight_decay=1e-2, augment=True, noise=0.5)
# the same network and the same labels: no augmentation, no weight decay and a loss driven to zero make it saturate
OVERCONFIDENT = ClassifierRecipe(300, epochs=400, learning_rate=2e-2, weight_decay=0.0, augment=False, noise=0.0)
JUDGE = ClassifierRecipe(
    1297, 100, 3e-3, weight_decay=1e-2, augment=True, noise=0.5, width=checkpoints.JUDGE_WIDTH, seed=1
)


class HybridLoss:
    """L_simple + 0.001 L_vlb of a model with learned-range variance (Nichol & Dhariwal, 2021, arXiv 2102.09672)."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).float()
        self.coefficients = schedule.respaced(schedule.num_timesteps).coefficients()

    def __call__(self, model: nn.Module, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean loss of images `x0` (B, C, H, W) at timesteps `t` (B,) under the given Gaussian noise."""
        bar = self.alphas_cumprod[t][:, None, None, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        eps, v = model(x_t, t, y=labels).chunk(2, dim=1)
        # the bound trains the variance alone: it is too noisy a teacher for the mean
        bound = self._bound(x0, x_t, t, eps.detach(), v)
        # 0.001 times the sum over all T steps, estimated from one of them
        return F.mse_loss(eps, noise) + 0.001 * self.schedule.num_timesteps * bound

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        row = self.coefficients[t][:, :, None, None, None].unbind(1)
        predicted = (
            row[Coefficient.SQRT_RECIP_ALPHAS_CUMPROD] * x_t - row[Coefficient.SQRT_RECIPM1_ALPHAS_CUMPROD] * eps
        )
        # both means share the part of x_t, so that only the x₀ parts tell them apart
        gap = row[Coefficient.POSTERIOR_MEAN_X0] * (predicted - x0)
        low, high = row[Coefficient.LOG_VARIANCE_MIN], row[Coefficient.LOG_VARIANCE_MAX]
        log_variance = low + (v + 1) / 2 * (high - low)
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap.square() * (-log_variance).exp())
        mean = row[Coefficient.POSTERIOR_MEAN_X0] * predicted + row[Coefficient.POSTERIOR_MEAN_XT] * x_t
        nats = torch.where(t[:, None, None, None] == 0, _decoder_nats(x0, mean, log_variance), kl)
        return nats.mean() / math.log(2)


def _decoder_nats(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−log of the Gaussian's mass in the grey level of x₀: 17 levels in −1..1, the outermost reaching to infinity."""
    scale = (-0.5 * log_variance).exp()
    normal = torch.distributions.Normal(0.0, 1.0)
    above = torch.where(x0 > 0.999, 1.0, normal.cdf(scale * (x0 + 1 / 16 - mean)))
    below = torch.where(x0 < -0.999, 0.0, normal.cdf(scale * (x0 - 1 / 16 - mean)))
    return -(above - below).clamp_min(1e-12).log()


def train_diffusion(
    digits: Digits, recipe: DiffusionRecipe = UNET, progress: bool = True, losses: list[float] | None = None
) -> nn.Module:
    """Train the digits' UNet and return its moving average; each step's loss is appended to `losses` if given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = digit_unet()
    generator = torch.Generator().manual_seed(recipe.seed)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    loss_of = HybridLoss(Schedule.linear())

    steps = trange(recipe.steps, desc="diffusion model", disable=not progress, mininterval=1)
    for _ in steps:
        chosen = torch.randint(len(digits.labels), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.label_dropout
        labels = digits.labels[chosen].masked_fill(dropped, NULL_CLASS)
        t = torch.randint(loss_of.schedule.num_timesteps, (recipe.batch_size,), generator=generator)
        noise = torch.randn(digits.images[chosen].shape, generator=generator)
        loss = loss_of(model, digits.images[chosen], labels, t, noise)
        _descend(loss, optimizer, decay)
        average.update_parameters(model)
        if losses is not None:
            losses.append(loss.item())
        steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return average.module.eval()


def train_classifier(digits: Digits, recipe: ClassifierRecipe, name: str, progress: bool = True) -> DigitClassifier:
    """Train a classifier of clean digits on the first `recipe.labels` of them; several threads may do so at once."""
    if recipe.labels < len(digits.labels):
        digits = few_labels(digits, recipe.labels)
    with _INITIALISING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = DigitClassifier(recipe.width, softplus_beta=recipe.softplus_beta)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches = math.ceil(len(digits.labels) / recipe.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches)

    epochs = trange(recipe.epochs, desc=name, disable=not progress, mininterval=1)
    for _ in epochs:
        for chosen in torch.randperm(len(digits.labels), generator=generator).split(recipe.batch_size):
            images = digits.images[chosen]
            if recipe.augment:
                images = augment(images, generator, recipe.noise)
            loss = F.cross_entropy(classifier(images), digits.labels[chosen])
            _descend(loss, optimizer, cycle)
        epochs.set_postfix(loss=f"{loss.item():.1e}", refresh=False)
    return classifier.eval()


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rate.step()


@torch.no_grad()
def measure_classifier(classifier: DigitClassifier, digits: Digits) -> dict[str, float]:
    """Accuracy, mean top confidence, cross-entropy (nats) and the median lead of the right logit over the others."""
    logits = classifier(digits.images)
    own = logits.gather(1, digits.labels[:, None])[:, 0]
    others = logits.scatter(1, digits.labels[:, None], -torch.inf).logsumexp(1)
    return {
        "accuracy": (logits.argmax(1) == digits.labels).double().mean().item(),
        "confidence": logits.softmax(1).amax(1).mean().item(),
        "cross_entropy": F.cross_entropy(logits, digits.labels).item(),
        "median_logit_lead": (own - others).median().item(),
    }


@torch.no_grad()
def measure_diffusion(model: nn.Module, digits: Digits) -> dict[str, float]:
    """The hybrid loss given the labels and without them, over timesteps and noise that are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    loss_of = HybridLoss(Schedule.linear())
    t = torch.linspace(0, loss_of.schedule.num_timesteps - 1, len(digits.labels)).long()
    noise = torch.randn(digits.images.shape, generator=generator)
    return {
        "hybrid_loss": loss_of(model, digits.images, digits.labels, t, noise).item(),
        "hybrid_loss_unconditional": loss_of(
            model, digits.images, torch.full_like(digits.labels, NULL_CLASS), t, noise
        ).item(),
    }


def measure_all(folder: Path) -> dict[str, dict[str, float]]:
    """What the checkpoints in `folder` reach on the test digits."""
    _, test = load_split()
    beta = checkpoints.SOFTPLUS_BETA
    return {
        checkpoints.UNET: measure_diffusion(checkpoints.load_unet(folder), test),
        checkpoints.GUIDE: measure_classifier(checkpoints.load_guide(folder), test),
        f"{checkpoints.GUIDE}, softplus": measure_classifier(checkpoints.load_guide(folder, softplus_beta=beta), test),
        checkpoints.OVERCONFIDENT: measure_classifier(checkpoints.load_guide(folder, overconfident=True), test),
        f"{checkpoints.OVERCONFIDENT}, softplus": measure_classifier(
            checkpoints.load_guide(folder, overconfident=True, softplus_beta=beta), test
        ),
        checkpoints.JUDGE: measure_classifier(checkpoints.load_judge(folder), test),
    }


def train_demo(
    out_dir: Path | str,
    diffusion: DiffusionRecipe = UNET,
    classifiers: dict[str, ClassifierRecipe] | None = None,
    progress: bool = True,
) -> Path:
    """Train all four networks, write them to `out_dir` with a card of how they were made, and return that folder.

    Takes some three minutes, on one CPU core. Everything is drawn from the recipes' seeds; results on another machine
    differ by rounding, which training amplifies.

    Args:
        out_dir: the folder to write to, from which `checkpoints.load_unet` and its like read.
        diffusion: the recipe of the diffusion model.
        classifiers: the recipes of the guide, its overconfident twin and the judge, by name.
        progress: show progress bars and figures.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recipes = classifiers or {
        checkpoints.GUIDE: GUIDE,
        checkpoints.OVERCONFIDENT: OVERCONFIDENT,
        checkpoints.JUDGE: JUDGE,
    }
    train, _ = load_split()
    trainings: dict[str, Callable[[], nn.Module]] = {
        name: partial(train_classifier, train, recipe, name, progress) for name, recipe in recipes.items()
    }
    trainings[checkpoints.UNET] = partial(train_diffusion, train, diffusion, progress)

    seconds = {}
    with one_thread():
        for name, training in trainings.items():
            start = time.perf_counter()
            checkpoints.save_half(training(), folder, name)
            seconds[name] = round(time.perf_counter() - start, 1)
        measured = measure_all(folder)

    _write_card(folder, {**recipes, checkpoints.UNET: diffusion}, seconds, measured)
    if progress:
        for name, figures in measured.items():
            print(f"{name:24}", "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        print(f"trained in {sum(seconds.values()):.0f} s; checkpoints in {folder}")
    return folder


def _write_card(
    folder: Path,
    recipes: dict[str, ClassifierRecipe | DiffusionRecipe],
    seconds: dict[str, float],
    measured: dict[str, dict[str, float]],
) -> None:
    import sklearn

    card = {
        "command": "calguide-fast train-demo",
        "data": "scikit-learn's handwritten digits (UCI, CC BY 4.0): 1297 to train on, 500 to test on",
        "precision": "weights are stored as float16 and used as float32; what is measured is measured after rounding",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
        "seconds": seconds,
        "measured_on_test_digits": {
            name: {key: round(value, 4) for key, value in figures.items()} for name, figures in measured.items()
        },
    }
    (folder / checkpoints.CARD).write_text(json.dumps(card, indent=2) + "\n")
