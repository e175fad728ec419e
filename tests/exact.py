"""The guidance gradient of one row in 100-digit decimals, where no difference of large terms can lose what matters."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

import torch
from formulas import phi
from torch import Tensor


def exact_gradient(
    row: Tensor,
    label: int,
    divergence: str,
    epsilon: float = 0.9,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """G (C,) and D at alpha = 1, as float64; quick for a row of few distinct values."""
    with localcontext(Context(prec=100, Emin=-(10**9), Emax=10**9)):
        logits = [Decimal(value) for value in row.tolist()]
        # what a class's logit and its being the label do not change is computed once
        kinds = {(logit, place == label): 0 for place, logit in enumerate(logits)}
        for place, logit in enumerate(logits):
            kinds[logit, place == label] += 1
        other_q = (1 - Decimal(epsilon)) / len(logits)
        q = {kind: other_q + (Decimal(epsilon) if kind[1] else 0) for kind in kinds}
        top = max(logits)
        p = normalised({kind: (kind[0] - top).exp() for kind in kinds}, kinds)
        p2 = normalised({kind: (Decimal(marginal_temperature) * (kind[0] - top)).exp() for kind in kinds}, kinds)
        f = phi(divergence)
        # p f'(p / q) by a symmetric difference: half of the digits are left
        step = Decimal("1e-25")
        w = {
            kind: q[kind] * (f(p[kind] / q[kind] * (1 + step)) - f(p[kind] / q[kind] * (1 - step))) / (2 * step)
            for kind in kinds
        }
        total = sum(count * w[kind] for kind, count in kinds.items())
        value = sum(count * q[kind] * f(p[kind] / q[kind]) for kind, count in kinds.items())
        grad = {
            kind: Decimal(joint_temperature) * kind[1]
            - Decimal(marginal_temperature) * p2[kind]
            - (w[kind] - p[kind] * total)
            for kind in kinds
        }
        found = [float(grad[logit, place == label]) for place, logit in enumerate(logits)]
    return torch.tensor(found, dtype=torch.float64), torch.tensor(float(value), dtype=torch.float64)


def normalised(terms: dict, counts: dict) -> dict:
    total = sum(count * terms[kind] for kind, count in counts.items())
    return {kind: term / total for kind, term in terms.items()}
