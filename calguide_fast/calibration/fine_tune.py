"""Fine-tuning a classifier for calibration: cross-entropy and a calibration loss, for a few epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from calguide_fast.calibration.losses import HuberECELoss, SmoothECELoss
from calguide_fast.calibration.predictions import check_predictions, top_label, widened
from calguide_fast.ops import checks
from calguide_fast.ops.smooth_ece import smooth_ece
from calguide_fast.schedule import Schedule

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Callable[[], Loss]] = {"smooth_ece": SmoothECELoss, "huber_ece": HuberECELoss}


class Epoch(NamedTuple):
    """What one epoch's batches gave, each before the step that followed it; means over its samples."""

    cross_entropy: float  # nats
    calibration: float  # the calibration loss of a batch, unweighted; 0 without one
    accuracy: float
    confidence: float  # mean probability of the top label
    smooth_ece: float  # of all the epoch's predictions together, not a mean over batches


def fine_tune(
    classifier: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    loss: str | Loss | None = "smooth_ece",
    loss_weight: float = 1.0,
    epochs: int = 5,
    *,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor | None = None,
    freeze_batch_norm: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> list[Epoch]:
    """Train a classifier, in place, on cross-entropy + loss_weight · calibration loss.

    Read the history for confidence against accuracy, and judge by the smooth ECE and the accuracy of *held-out* data,
    against a run with ``loss=None``: fresh data alone can do as much (see :class:`SmoothECELoss`,
    :func:`huber_ece` for what each loss rewards).

    Args:
        classifier: ``classifier(x)``, or ``classifier(x_t, t)`` with a schedule; returns logits (B, num_classes). Its
            parameters that require gradients are trained. Every module's training flag is afterwards what it was.
        loader: gives (x, labels) batches, anew in every epoch (a DataLoader, a list, not a generator); they are moved
            to the classifier's device. A calibration loss wants batches of some hundreds.
        loss: ``"smooth_ece"``, ``"huber_ece"``, a callable (logits, labels) → scalar, or None for cross-entropy alone.
        loss_weight: ≥ 0, of the calibration loss.
        epochs: passes over the loader, at least 1.
        lr: of AdamW without weight decay, if no optimizer is given; 1e-4 unless given.
        optimizer: over the classifier's parameters; its state goes on from where it was.
        schedule: noise the inputs for a classifier of (x_t, t): x_t = √ᾱ_t x + √(1−ᾱ_t) ε, t uniform over 0..T−1.
            As :meth:`calguide_fast.schedule.Schedule.of`.
        freeze_batch_norm: keep batch normalisation in eval mode: the running statistics stay, and the loss sees the
            network that guidance will use. Its scales and shifts are trained.
        seed: of all that is random (noise, t, dropout, and a DataLoader's shuffling unless it has a generator of its
            own), without touching the caller's random state. The same seed gives the same weights, on the same machine.
        progress: show a progress bar.

    Returns:
        The history, an :class:`Epoch` each.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range, nothing to train, or an epoch without
            batches.
        ArithmeticError: a batch's loss is not finite. Its step is not taken.
    """
    calibration_loss = _resolve_loss(loss)
    loss_weight = checks.number("loss_weight", loss_weight, low=0.0)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs={epochs!r} must be a positive integer")
    if optimizer is not None and lr is not None:
        raise ValueError("give lr or an optimizer, which has its own, not both")
    trained = [p for p in classifier.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the classifier requires a gradient: there is nothing to train")
    if optimizer is None:
        lr = 1e-4 if lr is None else checks.number("lr", lr, low=0.0)
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    noising = None if schedule is None else _Noising(Schedule.of(schedule), trained[0].device)

    history = []
    with _own_random_state(seed, trained[0].device), _training_mode(classifier, freeze_batch_norm), torch.enable_grad():
        for epoch in range(epochs):
            record = _Record()
            batches = tqdm(loader, desc=f"epoch {epoch + 1} of {epochs}", disable=not progress)
            for x, labels in batches:
                x, labels = x.to(trained[0].device), labels.to(trained[0].device)
                logits = classifier(x) if noising is None else classifier(*noising(x))
                check_predictions(logits, labels)
                cross_entropy = _finite("cross-entropy", F.cross_entropy(widened(logits), labels.long()), epoch)
                calibration = _finite("calibration loss", calibration_loss(logits, labels), epoch)
                optimizer.zero_grad()
                (cross_entropy + loss_weight * calibration).backward()
                optimizer.step()
                record.add(logits.detach(), labels, cross_entropy.item(), calibration.item())
            if not record.sizes:
                raise ValueError(
                    f"the loader gave no batch in epoch {epoch + 1}: it must hold some, and be iterable anew in each "
                    "epoch, as a DataLoader or a list is and a generator is not"
                )
            history.append(record.summary())
        optimizer.zero_grad()
    return history


def _finite(name: str, loss: Tensor, epoch: int) -> Tensor:
    if not loss.isfinite():
        raise ArithmeticError(
            f"the {name} is {loss.item()} in epoch {epoch + 1}: if the data are finite, a smaller learning rate helps"
        )
    return loss


class _Noising:
    """x → (x_t, t): q(x_t | x_0) at uniform timesteps."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        bar = torch.from_numpy(schedule.alphas_cumprod).to(device)
        self.signal, self.noise = bar.sqrt().float(), (1 - bar).sqrt().float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(len(self.signal), (len(x),), device=x.device)
        shape = (-1, *[1] * (x.ndim - 1))
        x_t = self.signal[t].view(shape) * x + self.noise[t].view(shape) * torch.randn_like(x, dtype=torch.float32)
        return x_t.to(x.dtype), t


class _Record:
    """An epoch's predictions, and its losses weighted by the batches' sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.losses: list[tuple[float, float]] = []
        self.confidence: list[Tensor] = []
        self.correct: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, cross_entropy: float, calibration: float) -> None:
        self.sizes.append(len(labels))
        self.losses.append((cross_entropy, calibration))
        confidence, correct = top_label(logits, labels)
        self.confidence.append(confidence)
        self.correct.append(correct)

    def summary(self) -> Epoch:
        cross_entropy, calibration = np.average(self.losses, axis=0, weights=self.sizes).tolist()
        confidence, correct = torch.cat(self.confidence), torch.cat(self.correct)
        return Epoch(
            cross_entropy,
            calibration,
            accuracy=correct.double().mean().item(),
            confidence=confidence.double().mean().item(),
            smooth_ece=smooth_ece(confidence, correct).value.item(),
        )


def _resolve_loss(loss: str | Loss | None) -> Loss:
    if loss is None:
        return lambda logits, labels: logits.new_zeros(())
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} must be {', '.join(map(repr, LOSSES))}, a callable or None")
        return LOSSES[loss]()
    if not callable(loss):
        raise TypeError(f"loss must be a name, a callable (logits, labels) or None, got {type(loss).__name__}")
    return loss


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    # torch.manual_seed would seed every device's generator, and only those named are put back
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.default_generator.manual_seed(seed)
        if not on_cpu:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield


@contextmanager
def _training_mode(classifier: nn.Module, freeze_batch_norm: bool) -> Iterator[None]:
    """Training mode while it lasts; then every module's own flag again."""
    flags = [(module, module.training) for module in classifier.modules()]
    classifier.train()
    if freeze_batch_norm:
        for module, _ in flags:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
