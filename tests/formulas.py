"""The guidance score as its definition says, and what the tests compare with: float64, by autograd, no algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor

from calguide_fast.ops.divergences import CODES


def log(t: Tensor | Decimal):
    return t.ln() if isinstance(t, Decimal) else t.log()


# phi(t) of D(q‖p) = sum_i q_i phi(p_i / q_i), of tensors and of Decimals; a divergence of the package without an entry
# here fails its tests
PHI: dict[str, Callable] = {
    "none": lambda t: 0 * t,
    "reverse_kl": lambda t: -log(t),
    "forward_kl": lambda t: t * log(t),
    "js": lambda t: (t * log(t) - (t + 1) * log((t + 1) / 2)) / 2,
    "jeffreys": lambda t: (t - 1) * log(t),
    "hellinger": lambda t: (t.sqrt() - 1) ** 2,
    "chi2": lambda t: (t - 1) ** 2,
    "neyman_chi2": lambda t: (1 - t) ** 2 / t,
}

# D for a one-hot target, where it is finite, as a function of the label's probability
ONE_HOT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "reverse_kl": lambda p_y: -p_y.log(),
    "js": lambda p_y: (p_y * p_y.log() - (1 + p_y) * ((1 + p_y) / 2).log() + (1 - p_y) * math.log(2)) / 2,
    "hellinger": lambda p_y: 2 - 2 * p_y.sqrt(),
    "neyman_chi2": lambda p_y: 1 / p_y - 1,
}

ORDERS = (-1.0, 0.5, 1.5, 2.0, 3.0)
NAMES = [name for name in CODES if name != "alpha"] + [f"alpha:{order:g}" for order in ORDERS]


def phi(name: str) -> Callable:
    if not name.startswith("alpha:"):
        return PHI[name]
    order = float(name.removeprefix("alpha:"))

    def cressie_read(t: Tensor | Decimal):
        a = Decimal(order) if isinstance(t, Decimal) else order
        return (t**a - a * t + a - 1) / (a * (a - 1))

    return cressie_read


def one_hot_divergence(name: str) -> Callable[[Tensor], Tensor] | None:
    """D at epsilon = 1 by p_y, or None where it is infinite."""
    if not name.startswith("alpha:"):
        return ONE_HOT.get(name)
    a = float(name.removeprefix("alpha:"))
    return (lambda p_y: (p_y**a - 1) / (a * (a - 1))) if a < 1 else None


class Literal(NamedTuple):
    grad: Tensor
    score: Tensor
    log_prob: Tensor
    entropy: Tensor
    divergence: Tensor


def literal_score(
    logits: Tensor,
    labels: Tensor,
    divergence: str = "js",
    alpha: float = 1.0,
    epsilon: float = 0.9,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
    entropy_weight: float = 0.0,
    adaptive_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, log-probability, entropy and divergence of each row, differentiable as they stand."""
    num_classes = logits.shape[1]
    p = logits.softmax(1)
    p_y = p[range(len(labels)), labels]
    log_prob = joint_temperature * logits[range(len(labels)), labels] - (marginal_temperature * logits).logsumexp(1)
    entropy = -(p * logits.log_softmax(1)).sum(1)
    if epsilon == 1.0:
        d = one_hot_divergence(divergence)(p_y)
    else:
        q = torch.full_like(p, (1 - epsilon) / num_classes)
        q[range(len(labels)), labels] += epsilon
        d = (q * phi(divergence)(p / q)).sum(1)
    weight = entropy_weight
    if adaptive_entropy:
        share = entropy / math.log(num_classes) if num_classes > 1 else torch.zeros_like(entropy)
        weight = entropy_weight * (1 - share).detach()
    return log_prob - alpha * d + weight * entropy, log_prob, entropy, d


def literal(logits: Tensor, labels: Tensor, **settings) -> Literal:
    """The score and its gradient in float64."""
    logits = logits.detach().double().requires_grad_()
    scalars = literal_score(logits, labels, **settings)
    (grad,) = torch.autograd.grad(scalars[0].sum(), logits)
    return Literal(grad, *(scalar.detach() for scalar in scalars))


# half a unit in the last place, relative
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


def assert_near(
    got: Tensor, expected: Tensor, tolerance: float, name: str = "value", size: Tensor | None = None
) -> None:
    """|got − expected| ≤ tolerance·max(1, size), plus one rounding into got's dtype; size is |expected| if not given.

    NaN on either side fails. An infinity must be one on both sides, once the expected value is rounded to got's dtype.
    """
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert not got.isnan().any(), f"{name}: NaN at {got.isnan().nonzero()[0].tolist()}"
    assert not expected.isnan().any(), f"{name}: the expected value is NaN at {expected.isnan().nonzero()[0].tolist()}"
    rounded = expected.to(got.dtype)
    finite = rounded.isfinite()
    assert torch.equal(got[~finite], rounded[~finite]), f"{name}: infinities differ"
    wide, expected = got.double()[finite], expected.double()[finite]
    size = expected.abs() if size is None else size.expand(finite.shape)[finite]
    excess = (wide - expected).abs() - tolerance * size.clamp(min=1) - ROUNDING[got.dtype] * expected.abs() - 2.0**-24
    if excess.numel():
        worst = int(excess.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
        # "not <=" and not ">", so that a NaN fails
        assert excess[worst] <= 0, f"{name}: got {wide[worst].item()!r}, expected {expected[worst].item()!r}"
