"""What people would write instead of our ops, in PyTorch: the rows that the benchmarks compare with.

Each peer computes the gradient and the scalars that make up the score, nothing that a user could leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ALPHA, EPSILON, TAU = 1.0, 0.9, 0.5
Scored = tuple[Tensor, Tensor]


def closed_form(divergence: str) -> Callable[[Tensor, Tensor], Scored]:
    """G and the score by the reduced formulas: q has two values, so its logarithms are two scalars."""
    return {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "js": _js}[divergence]


def _common(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    label = labels[:, None]
    grad = -TAU * torch.softmax(TAU * logits, 1)
    grad.scatter_add_(1, label, torch.ones_like(grad[:, :1]))
    log_prob = logits.gather(1, label).squeeze(1) - torch.logsumexp(TAU * logits, 1)
    return grad, log_prob, torch.log_softmax(logits, 1), label


def _targets(num_classes: int) -> tuple[float, float]:
    other = (1 - EPSILON) / num_classes
    return other + EPSILON, other


def _reverse_kl(logits: Tensor, labels: Tensor) -> Scored:
    grad, log_prob, log_p, label = _common(logits, labels)
    q_label, q_other = _targets(logits.shape[1])
    d_grad = log_p.exp() - q_other
    d_grad.scatter_add_(1, label, torch.full_like(d_grad[:, :1], q_other - q_label))
    cross = q_other * log_p.sum(1) + (q_label - q_other) * log_p.gather(1, label).squeeze(1)
    own = q_label * math.log(q_label) + (logits.shape[1] - 1) * q_other * math.log(q_other)
    return grad - ALPHA * d_grad, log_prob - ALPHA * (own - cross)


def _forward_kl(logits: Tensor, labels: Tensor) -> Scored:
    grad, log_prob, log_p, label = _common(logits, labels)
    q_label, q_other = map(math.log, _targets(logits.shape[1]))
    p = log_p.exp()
    log_ratio = log_p - q_other
    log_ratio.scatter_add_(1, label, torch.full_like(p[:, :1], q_other - q_label))
    divergence = (p * log_ratio).sum(1)
    return grad - ALPHA * p * (log_ratio - divergence[:, None]), log_prob - ALPHA * divergence


def _js(logits: Tensor, labels: Tensor) -> Scored:
    grad, log_prob, log_p, label = _common(logits, labels)
    q_label, q_other = _targets(logits.shape[1])
    p = log_p.exp()
    # q written out: Inductor was seen to take the log before a scatter into p + q
    log_total = (p + torch.full_like(p, q_other).scatter_(1, label, q_label)).log()
    w = 0.5 * p * (log_p - log_total + math.log(2))
    w_sum = w.sum(1)
    q_log_total = q_other * log_total.sum(1) + (q_label - q_other) * log_total.gather(1, label).squeeze(1)
    own = q_label * math.log(2 * q_label) + (logits.shape[1] - 1) * q_other * math.log(2 * q_other)
    return grad - ALPHA * (w - p * w_sum[:, None]), log_prob - ALPHA * (w_sum + 0.5 * (own - q_log_total))


def reduced(divergence: str) -> Callable[[Tensor, Tensor], Scored]:
    """G and the score with one exponential an element, and a logarithm for JS alone: the fairest form in PyTorch.

    With d = f − max f, e = exp(d) and e₂ = √e (τ₂ = ½), G is e (b₀ + b₁ d) + a e₂ + c but at the label.
    """
    return {"reverse_kl": _reduced_reverse_kl, "forward_kl": _reduced_forward_kl, "js": _reduced_js}[divergence]


class _Reduced:
    """What all three share: exponentials, their sums, and the label's own values, each (B, 1)."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        # TAU is one half
        self.label = labels[:, None]
        top = logits.amax(1, keepdim=True)
        self.d = logits - top  # [B, C]
        self.e = self.d.exp()
        self.root = self.e.sqrt()
        self.inverse = self.e.sum(1, keepdim=True).reciprocal()
        self.log_sum = -self.inverse.log()
        self.root_sum = self.root.sum(1, keepdim=True)
        self.label_d = self.d.gather(1, self.label)
        self.label_p = self.label_d.exp() * self.inverse
        self.log_prob = self.label_d + top - TAU * top - self.root_sum.log()

    def grad(self, of_divergence: Tensor, at_label: Tensor) -> Tensor:
        """G, from what the divergence puts everywhere, overwritten, and what it adds at the label."""
        grad = of_divergence.addcmul_(self.root, -TAU / self.root_sum)
        return grad.scatter_add_(1, self.label, at_label + 1)

    def score(self, divergence: Tensor) -> Tensor:
        return (self.log_prob - ALPHA * divergence).squeeze(1)


def _reduced_reverse_kl(logits: Tensor, labels: Tensor) -> Scored:
    r = _Reduced(logits, labels)
    classes = logits.shape[1]
    q_label, q_other = _targets(classes)
    own = q_label * math.log(q_label) + (classes - 1) * q_other * math.log(q_other)
    log_p_sum = r.d.sum(1, keepdim=True) - classes * r.log_sum
    cross = q_other * log_p_sum + (q_label - q_other) * (r.label_d - r.log_sum)
    at_label = torch.full_like(r.label_p, ALPHA * (q_label - q_other))
    return r.grad(r.e * (-ALPHA * r.inverse) + ALPHA * q_other, at_label), r.score(own - cross)


def _reduced_forward_kl(logits: Tensor, labels: Tensor) -> Scored:
    r = _Reduced(logits, labels)
    log_label, log_other = map(math.log, _targets(logits.shape[1]))
    weighted = r.e * r.d
    excess = log_label - log_other
    divergence = weighted.sum(1, keepdim=True) * r.inverse - r.log_sum - log_other - excess * r.label_p
    b = ALPHA * r.inverse
    of_divergence = weighted.mul_(-b).addcmul_(r.e, b * (r.log_sum + log_other + divergence))
    return r.grad(of_divergence, ALPHA * excess * r.label_p), r.score(divergence)


def _reduced_js(logits: Tensor, labels: Tensor) -> Scored:
    r = _Reduced(logits, labels)
    classes = logits.shape[1]
    q_label, q_other = _targets(classes)
    p = r.e * r.inverse
    log_total = (p + q_other).log()
    label_log_total, label_log_other = (r.label_p + q_label).log(), (r.label_p + q_other).log()
    # what the line after it has too much at the label, where q is another
    label_excess = 0.5 * r.label_p * (label_log_total - label_log_other)
    w = (r.d - log_total).add_(math.log(2) - r.log_sum).mul_(p).mul_(0.5)
    w_sum = w.sum(1, keepdim=True) - label_excess
    q_log_total = q_other * (log_total.sum(1, keepdim=True) - label_log_other) + q_label * label_log_total
    own = q_label * math.log(2 * q_label) + (classes - 1) * q_other * math.log(2 * q_other)
    of_divergence = w.mul_(-ALPHA).addcmul_(p, ALPHA * w_sum)
    return r.grad(of_divergence, ALPHA * label_excess), r.score(w_sum + 0.5 * (own - q_log_total))


def score(divergence: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The score as one would first write it down: EluCD's log-probability, and less a divergence's share if any."""

    def run(logits: Tensor, labels: Tensor) -> Tensor:
        log_prob = logits.gather(1, labels[:, None]).squeeze(1) - torch.logsumexp(TAU * logits, 1)
        if divergence == "none":
            return log_prob
        log_p = torch.log_softmax(logits, 1)
        q = torch.full_like(logits, (1 - EPSILON) / logits.shape[1])
        q.scatter_add_(1, labels[:, None], torch.full_like(q[:, :1], EPSILON))
        p, log_q = log_p.exp(), q.log()
        if divergence == "reverse_kl":
            d = (q * (log_q - log_p)).sum(1)
        elif divergence == "forward_kl":
            d = (p * (log_p - log_q)).sum(1)
        else:
            log_m = ((p + q) / 2).log()
            d = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(1)
        return log_prob - ALPHA * d

    return run


def autograd(divergence: str) -> Callable[[Tensor, Tensor], Scored]:
    """G by differentiating the score."""
    of = score(divergence)

    def run(logits: Tensor, labels: Tensor) -> Scored:
        logits = logits.detach().requires_grad_()
        s = of(logits, labels)
        (grad,) = torch.autograd.grad(s.sum(), logits)
        return grad, s.detach()

    return run


def ddpm_step(row: list[float], scale: float) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The guided DDPM step with learned variance, coefficients baked in as Python floats."""
    c = row

    def step(x_t: Tensor, model_output: Tensor, gradient: Tensor, noise: Tensor) -> Tensor:
        eps, v = model_output.chunk(2, 1)
        x0 = (c[0] * x_t - c[1] * eps).clamp(-1, 1)
        frac = (v + 1) / 2
        log_variance = frac * c[4] + (1 - frac) * c[5]
        mean = c[2] * x0 + c[3] * x_t + log_variance.exp() * (scale * gradient)
        return mean + (0.5 * log_variance).exp() * noise

    return step


def clean_image(row: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """The clipped x̂₀, of a model that predicts a variance, too."""

    def predict(x_t: Tensor, model_output: Tensor) -> Tensor:
        return (row[0] * x_t - row[1] * model_output[:, : x_t.shape[1]]).clamp(-1, 1)

    return predict


def weights(scores: Tensor, tilt: float) -> Tensor:
    """Of the images of a tilt group; their mean is 1."""
    return len(scores) * torch.softmax(tilt * scores, 0)
