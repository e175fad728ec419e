"""Vector scaling: a scale and a bias for each class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calguide_fast.calibration.predictions import check_predictions
from calguide_fast.calibration.temperature import CalibratedClassifier
from calguide_fast.ops import checks

_MOST_STEPS = 100
_LEAST_DECREASE = 1e-12  # nats: a Newton step that promises less ends the search
_BLOCK = 8192  # samples at a time, which bounds memory


class VectorScaling(nn.Module):
    """Logits w∘f + b, with a scale and a bias for each class; the order of the classes may change.

    :meth:`fit` minimises the mean cross-entropy + penalty/(2n) (‖w − 1‖² + ‖b‖²), which is strictly convex, by Newton's
    method in float64 with a line search; the result depends on no starting point and no learning rate. Without the
    penalty a bias common to all classes is undetermined, and a class that is separated without an error asks for an
    infinite scale. 2·num_classes numbers are fitted: on few samples for each class prefer
    :class:`~calguide_fast.calibration.TemperatureScaling`, or a greater penalty.

    Args:
        num_classes: of the logits, C.
        penalty: > 0: its inverse is the variance of a Gaussian prior on each w_c − 1 and b_c.

    Attributes:
        weight, bias: (C,) float64 buffers; saved with the module.
        converged: whether the last fit reached the minimum to 1e-12 nats.

    Raises:
        TypeError, ValueError: num_classes is no positive integer, or penalty is not > 0.

    Source: Guo et al., ICML 2017, arXiv 1706.04599.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_classes: int, penalty: float = 1.0) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be a positive integer")
        self.penalty = checks.number("penalty", penalty, low=0.0)
        if self.penalty == 0.0:
            raise ValueError(f"penalty={penalty!r} must be greater than 0")
        self.num_classes = num_classes
        self.register_buffer("weight", torch.ones(num_classes, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(num_classes, dtype=torch.float64))
        self.converged = False

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> VectorScaling:
        """Set scales and biases to those of least penalised cross-entropy.

        Takes O(n C²) a step and some ten steps; the Hessian is 2C × 2C.

        Args:
            logits: (n, C) of data that the classifier was not trained on; finite.
            labels: (n,) integers.

        Returns:
            The module itself. A RuntimeWarning says so, and ``converged`` is False, where the search has not
            reached the minimum.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device, no samples, a label out of range, or logits that
                are not finite.
        """
        check_predictions(logits, labels)
        checks.check_labels(labels, logits.shape[1])
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits has {logits.shape[1]} classes; it must have num_classes={self.num_classes}")
        if not logits.isfinite().all():
            raise ValueError("logits hold NaN or infinite values; vector scaling needs finite ones")
        objective = _Objective(logits, labels.long(), self.penalty / len(labels))
        found, self.converged = _minimum(objective)
        weight, bias = found.chunk(2)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if not self.converged:
            warnings.warn(
                f"vector scaling has not converged within {_MOST_STEPS} Newton steps, on logits of magnitude up to "
                f"{logits.abs().max().item():.3g}; a greater penalty makes it easier",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """w∘logits + b, in their own dtype; on the module's device."""
        checks.floating("logits", logits)
        return logits * self.weight.to(logits.dtype) + self.bias.to(logits.dtype)

    def wrap(self, classifier: Callable[..., Tensor]) -> CalibratedClassifier:
        """The classifier, calibrated: what it takes it still takes, its logits are scaled."""
        return CalibratedClassifier(classifier, self)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, penalty={self.penalty:g}"


class _Objective:
    """Penalised mean cross-entropy of parameters (w, b) in one vector (2C,), float64."""

    def __init__(self, logits: Tensor, labels: Tensor, ridge: float) -> None:
        self.logits, self.labels, self.ridge = logits, labels, ridge
        count = logits.shape[1]
        self.origin = torch.cat([logits.new_ones(count), logits.new_zeros(count)]).double()

    def value(self, parameters: Tensor) -> float:
        total = 0.5 * self.ridge * (parameters - self.origin).square().sum()
        for scaled, _, labels in self._blocks(parameters):
            total = total + F.cross_entropy(scaled, labels, reduction="sum") / len(self.labels)
        return total.item()

    def derivatives(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (2C,) and Hessian (2C, 2C)."""
        gradient = self.ridge * (parameters - self.origin)
        hessian = self.ridge * torch.eye(len(parameters), dtype=torch.float64, device=parameters.device)
        for scaled, logits, labels in self._blocks(parameters):
            p = scaled.softmax(1) / len(self.labels)
            right = F.one_hot(labels, scaled.shape[1]).double() / len(self.labels)
            gradient = gradient + torch.cat([((p - right) * logits).sum(0), (p - right).sum(0)])
            # of each sample diag(p) − p pᵀ, on both sides times (f, 1)
            on_diagonal = [(p * logits * logits).sum(0).diag(), (p * logits).sum(0).diag(), p.sum(0).diag()]
            hessian += torch.cat([torch.cat(on_diagonal[:2], 1), torch.cat(on_diagonal[1:], 1)])
            outer = torch.cat([p * logits, p], 1)
            hessian -= len(self.labels) * outer.T @ outer
        return gradient, hessian

    def _blocks(self, parameters: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scaled logits, logits and labels, some samples at a time."""
        weight, bias = parameters.chunk(2)
        for logits, labels in zip(self.logits.split(_BLOCK), self.labels.split(_BLOCK)):
            logits = logits.double()
            yield weight * logits + bias, logits, labels


def _minimum(objective: _Objective) -> tuple[Tensor, bool]:
    """Newton's method with a backtracking line search, and whether it converged."""
    parameters = objective.origin
    value = objective.value(parameters)
    for _ in range(_MOST_STEPS):
        gradient, hessian = objective.derivatives(parameters)
        step = -torch.linalg.solve(hessian, gradient)
        decrease = -(gradient @ step).item() / 2
        if decrease <= _LEAST_DECREASE:
            return parameters, True
        size = 1.0
        # Armijo's rule
        while (tried := objective.value(parameters + size * step)) > value - 0.1 * size * decrease:
            size /= 2
            if size < 1e-10:
                return parameters, False
        parameters, value = parameters + size * step, tried
    return parameters, False
