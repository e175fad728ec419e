"""Every op in plain PyTorch: the ground truth that kernels are tested against, and the fallback everywhere else.

Written to be read beside the formulas, not to be fast. The guidance gradient is computed in float64 whatever the input,
as it can be a small difference of large terms; the sampling steps and weights in float32, where they are sums of a few
terms. Results are cast back. Signatures are those that every backend offers; arguments have been checked by
``calguide_fast.ops``. Like the kernels, nothing here records a graph for autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calguide_fast.backends.labels import check_labels
from calguide_fast.backends.philox import philox_normal
from calguide_fast.backends.smooth_ece import smooth_ece, smooth_ece_gradient

__all__ = [
    "guidance_gradient",
    "guided_step",
    "philox_normal",
    "predict_x0",
    "smooth_ece",
    "smooth_ece_gradient",
    "tilt_weights",
    "top_label",
    "top_label_backward",
]


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _widest(tensor: Tensor) -> Tensor:
    """In float64, or in float32 where there is none (Apple's mps)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@torch.no_grad()
def guidance_gradient(
    logits: Tensor,
    labels: Tensor,
    divergence: int,
    order: float,
    alpha: float,
    epsilon: float,
    joint_temperature: float,
    marginal_temperature: float,
    entropy_weight: float,
    adaptive_entropy: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient (B, C) in the logits' dtype and statistics (5, B) fp32 (float64 for float64), computed in float64.

    On a device without float64 (Apple's mps) they are computed in float32. A label out of range is a ValueError.
    """
    check_labels(labels, logits.shape[1])
    # results are contiguous whatever the strides of the logits
    f = _widest(logits).contiguous()  # [B, C]
    y = labels[:, None]
    masked = f == -math.inf
    label_masked = masked.gather(1, y)
    onehot = torch.zeros_like(f).scatter_(1, y, 1.0)

    # a masked class is as good as absent: the target is spread over the others, and counts them only
    num_classes = (~masked).sum(1, keepdim=True)
    label_weight = epsilon * (~label_masked).to(f.dtype)
    q = ((1 - label_weight) / num_classes + label_weight * onehot).masked_fill(masked, 0.0)

    log_p = torch.log_softmax(f, 1)
    p = log_p.exp()
    tempered = (marginal_temperature * f).masked_fill(masked, -math.inf)
    p2 = torch.softmax(tempered, 1)
    f_y = f.gather(1, y)
    log_prob = joint_temperature * f_y - torch.logsumexp(tempered, 1, keepdim=True)
    # set, not computed: at a zero temperature it would be 0 times infinity
    log_prob = log_prob.masked_fill(label_masked, -math.inf)

    # p log p with p = 0 is 0, also where log p is -inf
    log_p = log_p.masked_fill(masked, 0.0)
    entropy = -(p * log_p).sum(1, keepdim=True)
    weight: float | Tensor = entropy_weight
    if adaptive_entropy:
        log_c = num_classes.to(f.dtype).log()
        weight = entropy_weight * (1 - torch.where(num_classes > 1, entropy / log_c, 0 * entropy))

    grad = joint_temperature * onehot - marginal_temperature * p2 - weight * p * (log_p + entropy)
    score = log_prob + weight * entropy
    w, terms = _DIVERGENCES[divergence](p, log_p, q, order)
    d = terms.masked_fill(masked, 0.0).sum(1, keepdim=True)
    if alpha != 0.0:
        w = w.masked_fill(masked, 0.0)
        grad = grad - alpha * _centred(w, p)
        score = score - alpha * d
    label_log_prob = log_p.gather(1, y).masked_fill(label_masked, -math.inf)
    # a NaN or infinite logit spoils the whole row, whichever terms are switched on
    spoilt = torch.where(entropy.isfinite(), 0.0, math.nan)
    grad = (grad + spoilt).to(logits.dtype)
    stats = torch.stack([(column + spoilt).squeeze(1) for column in (score, log_prob, entropy, d, label_log_prob)])
    stats = stats.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return (grad if out is None else out.copy_(grad)), stats


def _centred(w: Tensor, p: Tensor) -> Tensor:
    """w_i − p_i Σ_j w_j, (B, C)."""
    total = w.sum(1, keepdim=True)
    # an infinite w (Neyman, alpha < 0) stays infinite: its own term outweighs p times the sum
    centred = torch.where(w.isinf(), w, w - torch.where(p > 0, p * total, 0 * p))
    # for the likeliest class (1 − p) w less p times the others' sum: the same, but exact where p rounds to 1
    top = p.argmax(1, keepdim=True)
    others_p = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    others_w = w.scatter(1, top, 0.0).sum(1, keepdim=True)
    w_top, p_top = w.gather(1, top), p.gather(1, top)
    return centred.scatter(1, top, torch.where(w_top.isinf(), w_top, others_p * w_top - p_top * others_w))


# Each function returns w_i = p_i phi'(p_i / q_i) and the terms q_i phi(p_i / q_i) of D, up to parts whose sum is 0.


def _none(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(p), torch.zeros_like(p)


def _reverse_kl(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    return -q, torch.xlogy(q, q) - q * log_p


def _forward_kl(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    log_ratio = log_p - q.log()
    return p * (log_ratio + 1), p * log_ratio


def _js(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    m = (p + q) / 2
    # both vanish together only where their product with the log is 0 as well
    log_m = torch.where(m > 0, m, 1.0).log()
    w = p * (log_p - log_m) / 2
    return w, w + (torch.xlogy(q, q) - q * log_m) / 2


def _jeffreys(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    log_ratio = log_p - q.log()
    return p * (log_ratio + 1) - q, (p - q) * log_ratio


def _hellinger(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    return p - (p * q).sqrt(), (p.sqrt() - q.sqrt()) ** 2


def _chi2(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    return 2 * p * (p - q) / q, (p - q) ** 2 / q


def _neyman_chi2(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    # q^2 / p in logs, so that it is right where p underflows
    q2_over_p = (2 * q.log() - log_p).exp()
    return p - q2_over_p, torch.where(p > q, (p - q) ** 2 / p, q2_over_p - 2 * q + p)


def _alpha(p: Tensor, log_p: Tensor, q: Tensor, order: float) -> tuple[Tensor, Tensor]:
    # p^a q^(1-a), in logs
    blend = (order * log_p + (1 - order) * q.log()).exp()
    return (blend - p) / (order - 1), (blend - order * p + (order - 1) * q) / (order * (order - 1))


_DIVERGENCES = (_none, _reverse_kl, _forward_kl, _js, _jeffreys, _hellinger, _chi2, _neyman_chi2, _alpha)


@torch.no_grad()
def top_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest probability (n,) fp32 (float64 for float64), its class (n,) int64 and whether that is the label.

    A label out of range is a ValueError, but on a GPU, which is not waited for, its row's confidence is NaN.
    """
    known = torch.ones_like(labels, dtype=torch.bool)
    if labels.device.type == "cpu":
        check_labels(labels, logits.shape[1])
    else:
        known = (labels >= 0) & (labels < logits.shape[1])
    f = _widest(logits)  # [n, C]
    top = f.masked_fill(f.isnan(), -math.inf).argmax(1)
    p = torch.softmax(f, 1).gather(1, top[:, None]).squeeze(1)
    confidence = p.where(known, math.nan).to(_upcast(logits).dtype)
    return confidence, top, (top == labels) & ~confidence.isnan()


@torch.no_grad()
def top_label_backward(grad_confidence: Tensor, logits: Tensor, confidence: Tensor, top: Tensor) -> Tensor:
    """The confidences' gradient in the logits, (n, C) in their dtype: g p_top (1[i = top] − p_i)."""
    p = torch.softmax(_widest(logits).contiguous(), 1)
    onehot = torch.zeros_like(p).scatter_(1, top[:, None], 1.0)
    # the row of a NaN confidence is NaN
    return ((_widest(grad_confidence) * confidence)[:, None] * (onehot - p)).to(logits.dtype)


@torch.no_grad()
def tilt_weights(scores: Tensor, tilt: float, normalize_sum: bool, max_weight: float) -> Tensor:
    weights = torch.softmax(tilt * _upcast(scores), 0)
    if not normalize_sum:
        weights = weights * scores.shape[0]
    return weights.clamp(max=max_weight)


@torch.no_grad()
def predict_x0(x_t: Tensor, model_output: Tensor, coefficients: Tensor, clip: bool, out: Tensor) -> Tensor:
    c = coefficients
    eps = model_output[:, : x_t.shape[1]].float()
    x0 = c[0] * x_t - c[1] * eps
    return out.copy_(x0.clamp(-1, 1) if clip else x0)


@torch.no_grad()
def guided_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    variance_max: Tensor | None,
    method: int,
    learned_variance: bool,
    scale: float,
    tilt: float,
    max_weight: float,
    normalize_sum: bool,
    sine_boost: float,
    clip: bool,
    out: Tensor,
) -> Tensor:
    c = coefficients
    channels = x_t.shape[1]
    per_image = (-1,) + (1,) * (x_t.ndim - 1)
    eps = model_output[:, :channels].float()
    x0 = predict_x0(x_t, model_output, c, clip, torch.empty_like(x_t))

    push = None
    if gradient is not None:
        push = scale * gradient.float()
        if weights is not None:
            push = push * weights.view(per_image)
        if scores is not None:
            push = push * tilt_weights(scores, tilt, normalize_sum, max_weight).view(per_image)

    z = noise
    if seeds is not None:
        z = philox_normal(seeds, x_t.shape[1:], int(c[14]), 0)

    if method == DDPM:
        if learned_variance:
            frac = (model_output[:, channels:].float() + 1) / 2
            sd = (0.5 * (frac * c[4] + (1 - frac) * c[5])).exp()
            variance = sd * sd
        else:
            sd, variance = c[7], c[6].expand_as(x_t)
        mean = c[2] * x0 + c[3] * x_t
        if variance_max is not None:
            torch.maximum(variance_max, variance.flatten(1)[:, 0], out=variance_max)
        if push is not None:
            boost = 0.0 if variance_max is None else sine_boost * c[12] * variance_max.view(per_image)
            mean = mean + (variance + boost) * push
        x_prev = mean if z is None else mean + c[13] * sd * z
    else:
        if push is None:
            eps = (c[0] * x_t - x0) / c[1]
        else:
            eps = (c[0] * x_t - x0) / c[1] - c[11] * push
            x0 = c[0] * x_t - c[1] * eps
        x_prev = c[8] * x0 + c[9] * eps
        if z is not None:
            x_prev = x_prev + c[13] * c[10] * z
    return out.copy_(x_prev)


DDPM = 0
DDIM = 1
