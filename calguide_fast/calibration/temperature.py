"""Temperature scaling: one number that makes a classifier as sure as it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calguide_fast.calibration.predictions import check_predictions
from calguide_fast.networks import check_callable
from calguide_fast.ops import checks

_TOLERANCE = 1e-12  # of log T
_BLOCK = 2**17  # logits at a time
_MASKED = -1e30  # the lead of a masked class


class TemperatureScaling(nn.Module):
    """Logits divided by one temperature T > 0, which leaves the classes' order, and so the accuracy, as it was.

    ``TemperatureScaling().fit(logits, labels)`` finds the T of least cross-entropy on held-out data; calling it
    divides logits by T, and :meth:`wrap` makes a calibrated classifier of a classifier.

    The cross-entropy is convex in 1/T, its slope there rises, and in log T it falls to one minimum and rises again. The
    slope's root is found in log T, in float64, by Newton's method inside a bracket that only shrinks; the result
    depends on no starting point and no learning rate. (In log T itself the loss is not convex: it flattens out
    toward T = ∞.)

    Where there is no root inside the bounds, T is the bound and ``at_bound`` says so: data that the classifier
    separates without an error ask for T → 0, logits that point away from the labels for T → ∞. Logits that are
    equal over the classes ask for nothing: T stays 1, if the bounds have it.

    Args:
        temperature: T before any fit, within the bounds.
        bounds: the least and the greatest T that a fit returns.

    Attributes:
        temperature: T, a scalar float64 buffer; saved with the module.
        at_bound: whether the last fit ended at a bound.
        slope: d(cross-entropy)/d(1/T) at the last fit's T, in nats: 0 but for rounding unless ``at_bound``.

    Raises:
        TypeError, ValueError: bounds that are no pair 0 < low < high, or a temperature outside them.

    Source: Guo et al., ICML 2017, arXiv 1706.04599.
    """

    temperature: Tensor

    def __init__(self, temperature: float = 1.0, bounds: Sequence[float] = (1e-2, 1e2)) -> None:
        super().__init__()
        low, high = _bounds(bounds)
        self.bounds = low, high
        value = checks.number("temperature", temperature, low=low, high=high)
        self.register_buffer("temperature", torch.tensor(value, dtype=torch.float64, device="cpu"))
        self.at_bound = False
        self.slope = math.nan

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> TemperatureScaling:
        """Set T to that of least cross-entropy.

        Args:
            logits: (n, num_classes) of data that the classifier was not trained on; −inf marks a masked class.
            labels: (n,) integers.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device, no samples, a label out of range or of a masked
                class, or logits that are NaN or +inf.
        """
        check_predictions(logits, labels)
        checks.check_labels(labels, logits.shape[1])
        if not (logits < math.inf).all():
            raise ValueError("logits hold NaN or +inf; they must be finite, or -inf for a masked class")
        own = logits.gather(1, labels.long()[:, None])
        if own.isinf().any():
            row = int(own.isinf().nonzero()[0, 0])
            raise ValueError(f"labels[{row}]={int(labels[row])} is a masked class: its logit is -inf")
        slope = _Slope(logits, own)
        low, high = map(math.log, self.bounds)
        self.at_bound = False
        if ((logits == own) | logits.isinf()).all():
            log_t = min(max(0.0, low), high)
        elif slope(low)[0] <= 0:
            log_t, self.at_bound = low, True
        elif slope(high)[0] >= 0:
            log_t, self.at_bound = high, True
        else:
            log_t = _root(slope, low, high)
        self.slope = slope(log_t)[0]
        self.temperature.fill_(math.exp(log_t))
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """Logits / T, in their own dtype."""
        checks.floating("logits", logits)
        return logits / self.temperature.to(logits.dtype)

    def wrap(self, classifier: Callable[..., Tensor]) -> CalibratedClassifier:
        """The classifier, calibrated: what it takes it still takes, its logits are divided by T."""
        return CalibratedClassifier(classifier, self)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature.item():.6g}"


class CalibratedClassifier(nn.Module):
    """A classifier whose logits pass through a scaling: the same inputs, also (x_t, t), and calibrated logits.

    Args:
        classifier: any module, or other callable, that returns logits (n, num_classes).
        scaling: a :class:`TemperatureScaling` or :class:`calguide_fast.calibration.VectorScaling`.
    """

    def __init__(self, classifier: Callable[..., Tensor], scaling: nn.Module) -> None:
        super().__init__()
        check_callable("classifier", classifier)
        self.classifier, self.scaling = classifier, scaling
        # a sampler reads both off a classifier; train() would set the classifier's own modules, too
        self.num_classes = getattr(classifier, "num_classes", None)
        self.training = getattr(classifier, "training", False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.scaling(self.classifier(*args, **kwargs))


class _Slope:
    """d(mean cross-entropy)/dβ at β = 1/T, and its derivative with respect to log T, which is never positive."""

    def __init__(self, logits: Tensor, own: Tensor) -> None:
        """Of logits (n, num_classes), and those of the labels (n, 1)."""
        # blocks that stay in a CPU's cache
        self.rows = max(1, _BLOCK // logits.shape[1])
        self.logits, self.own = logits, own

    def __call__(self, log_t: float) -> tuple[float, float]:
        beta = math.exp(-log_t)
        mean, variance = 0.0, 0.0
        for logits, own in zip(self.logits.split(self.rows), self.own.split(self.rows)):
            # a masked class has p = 0, and so far behind no part in any sum: 0·inf would be NaN
            lead = (logits.double() - own.double()).clamp_min_(_MASKED)
            p = (beta * lead).softmax(1)
            weighted = p.mul_(lead)
            means = weighted.sum(1)
            mean += means.sum()
            variance += (weighted.mul_(lead).sum(1) - means.square()).sum()
        count = len(self.logits)
        return float(mean) / count, -beta * float(variance) / count


def _root(slope: _Slope, low: float, high: float) -> float:
    """log T where the slope is 0; it is positive at `low` and negative at `high`."""
    log_t, step = min(max(0.0, low), high), high - low
    while abs(step) > _TOLERANCE:
        value, derivative = slope(log_t)
        if value == 0:
            break
        low, high = (log_t, high) if value > 0 else (low, log_t)
        newton = -value / derivative if derivative < 0 else math.inf
        # bisect where Newton's step leaves the bracket or is no shorter than half the last one: either way it ends
        if low < log_t + newton < high and abs(newton) <= abs(step) / 2:
            step = newton
        else:
            step = (low + high) / 2 - log_t
        log_t += step
    return log_t


def _bounds(bounds: Sequence[float]) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise ValueError(f"bounds={bounds!r} must be a pair (low, high) of temperatures")
    low, high = (checks.number("bounds", bound) for bound in bounds)
    if not 0 < low < high:
        raise ValueError(f"bounds={bounds!r} must be (low, high) with 0 < low < high")
    return low, high
