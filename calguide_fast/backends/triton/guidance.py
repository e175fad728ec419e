"""Logits to guidance gradient and score, in tiles of (rows, classes): the algebra of `csrc/fdiv_math.h`.

With d = f - max f, e = exp(d) and s = sum e, what is per class is
  G_i = e_i (b0 + b1 d_i) + a2 exp(marginal temperature * d_i) + c0 - alpha (w_i - p_i sum w),
with w of `_class_terms` for the divergences outside the Kullback-Leibler family and without it inside. The numbers of a
row are float64, those of a class float32 (float64 for the powers of p / q). Sums run over the classes that are neither
the label nor the largest logit: those few are known exactly, and a sum that held them would round the rest away.
Padding is one more masked class. What a GPU's exp, log and square root are off by stays well inside the tolerance.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calguide_fast.backends.triton.launch import as_double, device_of, doubles, tile_shape

REVERSE_KL = tl.constexpr(1)
FORWARD_KL = tl.constexpr(2)
JS = tl.constexpr(3)
JEFFREYS = tl.constexpr(4)
HELLINGER = tl.constexpr(5)
CHI2 = tl.constexpr(6)
NEYMAN_CHI2 = tl.constexpr(7)

LOG_2 = tl.constexpr(math.log(2))
# stands for log 0 where q is 0, and below every difference of logits: finite, so that 0 * log 0 is 0
LOG_ZERO = tl.constexpr(-1e30)

# divergences whose class terms are float64
_IN_DOUBLE = (6, 7, 8)

# A thread has 8 classes, for loads of 16 bytes. The widest tile is one whose numbers stay in registers, with float64
# class terms too; a longer row is read again, out of the cache. Short rows share a tile of 2 classes a thread, because
# each thread computes the numbers of all rows that it has a part of.
NARROWEST = 256
WIDEST = 2048
# warps of a program, one for 256 classes of its tile, and how many tiles of a long row are on their way at once
LEAST_WARPS, MOST_WARPS = 4, 8
STAGES = 3


@triton.jit
def _log1p(x):
    """log(1 + x) of a float64 x >= 0, to the last digits of x (Kahan): what 1 + x has rounded cancels in the ratio."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit
def _expm1(x):
    """e^x - 1 in float64, relative error 2e-13, x clamped to +-700: expm1_bounded of `csrc/vector_math.h`."""
    bounded = tl.minimum(tl.maximum(x, -700.0), 700.0)
    # adding 1.5 * 2^52 rounds to an integer in the low bits; the further 1023 makes them the biased exponent of 2^n
    shifted = bounded * 1.4426950408889634 + 6755399441056767.0
    n = shifted - 6755399441056767.0
    # log(2) in two parts, the first short enough for an exact product
    r = (bounded - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    c = r * 2.749307383947228e-06 + 2.4880809882287145e-05
    c = c * r + 0.00019841539067031732
    c = c * r + 0.0013888811144638824
    c = c * r + 0.008333333095109202
    c = c * r + 0.04166666696224261
    c = c * r + 0.16666666667265162
    c = c * r + 0.4999999999966431
    power = (shifted.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
    return power * (c * (r * r) + r) + (power - 1.0)


@triton.jit
def _class_terms(p, log_p, q, log_q, order, DIVERGENCE: tl.constexpr):
    """w = p phi'(p / q), normalised so that phi'(1) = 0, and the term that sums to D; for js both are halved.

    All are homogeneous: p and q may come with any common factor. See `csrc/fdiv_math.h`.
    """
    if DIVERGENCE == JS:
        # phi = (t log t - (t + 1) log((t + 1) / 2)) / 2: one log per class, never that of a clamped ratio
        log_sum = tl.log(p + tl.maximum(q, 1e-37))
        w = p * ((log_p + LOG_2) - log_sum)
        value = w + q * ((log_q + LOG_2) - log_sum)
    elif DIVERGENCE == HELLINGER:
        # phi = (sqrt t - 1)^2
        root, difference = tl.sqrt(p), tl.sqrt(p) - tl.sqrt(q)
        w, value = root * difference, difference * difference
    elif DIVERGENCE == CHI2:
        # phi = (t - 1)^2
        excess = (p - q) * (1.0 / q)
        w, value = 2.0 * p * excess, (p - q) * excess
    elif DIVERGENCE == NEYMAN_CHI2:
        # phi = (1 - t)^2 / t: infinite where p is 0, but q = 0 leaves p
        ratio = (p - q) / p
        w, value = tl.where(q > 0.0, ratio * (p + q), p), tl.where(q > 0.0, ratio * (p - q), p)
    else:
        # phi = (t^a - a t + a - 1) / (a (a - 1)). p (t^(a-1) - 1) and q (t^a - 1) both sum to a (a - 1) D: below
        # a = 1/2 the second is taken, above it the first, by expm1 so that a may come as close to 0 and 1 as it likes
        low = order < 0.5
        factor = 1.0 / (order - 1.0)
        excess = tl.where(low, q, p) * _expm1(tl.where(low, order, order - 1.0) * (log_p - log_q)) * factor
        w, value = tl.where(low, excess + (q - p) * factor, excess), excess * (1.0 / order)
    return w, value


@triton.jit
def _centred(w, p, total):
    """w - p total where either may be infinite: an infinite w outweighs, and 0 * inf is 0."""
    return tl.where(tl.abs(w) == float("inf"), w, w - tl.where(p == 0.0, 0.0, p * total))


@triton.jit
def _tile(logits, row, start, label, batch, classes, row_stride, class_stride, BLOCK: tl.constexpr):
    """fp32 logits from a class on, [ROWS, BLOCK], -inf beyond the last; and which are neither masked nor the label."""
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = (row < batch)[:, None] & (column < classes)
    offset = row[:, None] * row_stride + column.to(tl.int64) * class_stride
    f = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
    return f, (f != float("-inf")) & (column != label[:, None])


@triton.jit
def _exponents(f, top, REAL: tl.constexpr):
    """d = f - max f, finite for a finite logit; a NaN stays."""
    d = f.to(REAL) - top.to(REAL)[:, None]
    return tl.where(d < LOG_ZERO, LOG_ZERO, d)


@triton.jit
def _sums(f, others, top, tau2, REAL: tl.constexpr):
    """How many others have the largest logit, and sums over the rest of them: of 1, d, e, e d and exp(tau2 d)."""
    d = _exponents(f, top, REAL)
    e, e2 = tl.exp(d), tl.exp(tau2 * d.to(tl.float32))
    # unequal, not below: NaN is among the rest, and with it their sums
    rest = others & (d != 0.0)
    n_top, n = tl.sum((others & (d == 0.0)).to(tl.int32), 1), tl.sum(rest.to(tl.int32), 1)
    sum_d, sum_e = tl.sum(tl.where(rest, d, 0.0), 1), tl.sum(tl.where(rest, e, 0.0), 1)
    sum_ed, sum_e2 = tl.sum(tl.where(rest, e * d, 0.0), 1), tl.sum(tl.where(rest, e2, 0.0), 1)
    return (
        n_top.to(tl.float64), n.to(tl.float64), sum_d.to(tl.float64), sum_e.to(tl.float64),
        sum_ed.to(tl.float64), sum_e2.to(tl.float64),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "batch", "class_groups", "row_groups",
        "order", "alpha", "epsilon", "joint_temperature", "marginal_temperature", "entropy_weight",
    ]
)  # fmt: skip
def _guidance_kernel(
    logits, labels, grad, stats, batch, class_groups, row_groups, class_stride, label_stride,
    order: tl.int64, alpha: tl.int64, epsilon: tl.int64, joint_temperature: tl.int64, marginal_temperature: tl.int64,
    entropy_weight: tl.int64,
    DIVERGENCE: tl.constexpr, ADAPTIVE: tl.constexpr, REAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    HAS_REVERSE: tl.constexpr = (DIVERGENCE == REVERSE_KL) | (DIVERGENCE == JEFFREYS)
    HAS_FORWARD: tl.constexpr = (DIVERGENCE == FORWARD_KL) | (DIVERGENCE == JEFFREYS)
    HAS_TERMS: tl.constexpr = (DIVERGENCE == JS) | (DIVERGENCE >= HELLINGER)
    order, alpha, epsilon = as_double(order), as_double(alpha), as_double(epsilon)
    tau1, tau2 = as_double(joint_temperature), as_double(marginal_temperature)
    # sizes as multiples of what they have in common, from which the compiler knows that it may read 16 bytes at a time
    classes, row_stride = class_groups * GROUP, row_groups.to(tl.int64) * GROUP

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < batch
    label = tl.load(labels + row * label_stride, mask=there, other=-1)
    is_class = (label >= 0) & (label < classes)
    label_f = tl.load(
        logits + row * row_stride + label * class_stride, mask=there & is_class, other=float("-inf")
    ).to(tl.float64)  # fmt: skip
    has_label = label_f != float("-inf")

    end = classes
    if FITS:
        end = BLOCK
        f, others = _tile(logits, row, 0, label, batch, classes, row_stride, class_stride, BLOCK)
        top = tl.max(f, 1)
        n_top, n, sum_d, sum_e, sum_ed, sum_e2 = _sums(f, others, top, tau2.to(tl.float32), REAL)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        n_top = tl.zeros([ROWS], tl.float64)
        n, sum_d, sum_e, sum_ed, sum_e2 = n_top, n_top, n_top, n_top, n_top
        for start in range(0, end, BLOCK):
            f, others = _tile(logits, row, start, label, batch, classes, row_stride, class_stride, BLOCK)
            highest = tl.maximum(top, tl.max(f, 1))
            # what was summed so far, seen from the new largest logit: the old one is then of the rest
            fall = tl.where(top == highest, 0.0, tl.maximum(top.to(tl.float64) - highest, LOG_ZERO))
            demoted = tl.where(fall < 0.0, n_top, 0.0)
            n += demoted
            sum_d += n * fall
            sum_ed = (sum_ed + (sum_e + demoted) * fall) * tl.exp(fall)
            sum_e = (sum_e + demoted) * tl.exp(fall)
            sum_e2 = (sum_e2 + demoted) * tl.exp(tau2 * fall)
            top = highest
            more_top, more, more_d, more_e, more_ed, more_e2 = _sums(f, others, top, tau2.to(tl.float32), REAL)
            n_top += more_top - demoted
            n += more
            sum_d += more_d
            sum_e += more_e
            sum_ed += more_ed
            sum_e2 += more_e2

    # p, log p and H
    label_d = tl.where(has_label, label_f - top, 0.0)
    label_e = tl.where(has_label, tl.exp(label_d), 0.0)
    label_e2 = tl.where(has_label, tl.exp(tau2 * label_d), 0.0)
    n_others = n_top + n
    n = n_others + has_label.to(tl.float64)
    # without the one that is exactly 1
    excess = (n_top - 1.0 + label_e) + sum_e
    s, log_s = 1.0 + excess, _log1p(excess)
    excess2 = (n_top - 1.0 + label_e2) + sum_e2
    s2, log_s2 = 1.0 + excess2, _log1p(excess2)
    p, rest, log_p = label_e / s, (n_top + sum_e) / s, label_d - log_s
    entropy = log_s - (sum_ed + label_e * label_d) / s

    # q
    label_weight = tl.where(has_label, epsilon, 0.0)
    other_q = tl.where(n > 1.0, (1.0 - label_weight) / n, 1.0)
    label_q = tl.where(n > 1.0, other_q + label_weight, 1.0)
    log_other_q = tl.where(other_q > 0.0, tl.log(other_q), LOG_ZERO)
    log_label_q = tl.log(label_q)

    # G as a linear form of e, e d, exp(tau2 d) and 1, and what of it is the label's own
    weight = as_double(entropy_weight) + tl.zeros([ROWS], tl.float64)
    if ADAPTIVE:
        weight *= tl.where(n > 1.0, 1.0 - entropy / tl.log(n), 1.0)
    linear, logarithmic, constant = weight * (log_s - entropy), -weight, tl.zeros([ROWS], tl.float64)
    at_label = tau1 - tau2 * label_e2 / s2 - weight * p * (log_p + entropy)
    divergence = tl.zeros([ROWS], tl.float64)
    if HAS_REVERSE:
        divergence += label_q * tl.where(has_label, log_label_q - log_p, 0.0)
        divergence += tl.where(other_q > 0.0, other_q * (n_others * (log_other_q + log_s) - sum_d), 0.0)
        linear -= alpha
        constant += alpha * other_q
        at_label += alpha * (rest - n_others * other_q)
    if HAS_FORWARD:
        gap = tl.where(has_label, log_label_q - log_other_q, 0.0)
        divergence += -entropy - rest * log_other_q - p * log_label_q
        linear += alpha * (log_s - entropy - p * gap)
        logarithmic -= alpha
        at_label -= alpha * p * (log_p + entropy - rest * gap)
    at_top = linear / s - tau2 / s2 + constant
    if HAS_TERMS:
        # terms of e and q s, not of p and q: the s divides out of their sums
        q, log_q = other_q * s, log_other_q + log_s
        unit = 1.0 / s
        if DIVERGENCE == JS:
            unit *= 0.5
        sum_w = tl.zeros([ROWS], tl.float64)
        sum_value = tl.zeros([ROWS], tl.float64)
        for start in range(0, end, BLOCK):
            if not FITS:
                f, others = _tile(logits, row, start, label, batch, classes, row_stride, class_stride, BLOCK)
            d = _exponents(f, top, REAL)
            w, value = _class_terms(tl.exp(d), d, q.to(REAL)[:, None], log_q.to(REAL)[:, None], order, DIVERGENCE)
            sum_w += tl.sum(tl.where(others & (d != 0.0), w, 0.0), 1).to(tl.float64)
            sum_value += tl.sum(tl.where(others & (d != 0.0), value, 0.0), 1).to(tl.float64)
        top_w, top_value = _class_terms(tl.full([ROWS], 1.0, tl.float64), constant, q, log_q, order, DIVERGENCE)
        label_w, label_value = _class_terms(label_e, label_d, label_q * s, log_label_q + log_s, order, DIVERGENCE)
        label_w, label_value = tl.where(has_label, label_w, 0.0), tl.where(has_label, label_value, 0.0)
        divergence = (sum_value + n_top * top_value + label_value) * unit
        others_w = sum_w + n_top * top_w
        pull = (others_w + label_w) / s
        scale = alpha * unit
        # for a class that may have nearly all, (1 - p) w less p times the sum of the others' w
        top_term = scale * (top_w * (sum_e + label_e) - (sum_w + label_w)) / s
        label_term = scale * _centred(label_w * rest, p, others_w)
        at_top -= tl.where(alpha == 0.0, 0.0, top_term)
        at_label -= tl.where(alpha == 0.0, 0.0, label_term)

    spoilt = (entropy != entropy) | ~is_class
    divergence = tl.where(divergence < 0.0, 0.0, divergence)
    log_prob = tl.where(has_label, tau2 * label_d - log_s2 + (tau1 - tau2) * label_f, float("-inf"))
    score = log_prob - tl.where(alpha == 0.0, 0.0, alpha * divergence) + weight * entropy
    score = tl.where(has_label, score, float("-inf"))
    label_log_prob = tl.where(has_label, log_p, float("-inf"))
    stride = batch.to(tl.int64)
    nan = tl.where(spoilt, float("nan"), 0.0)
    tl.store(stats + row, (score + nan).to(tl.float32), mask=there)
    tl.store(stats + stride + row, (log_prob + nan).to(tl.float32), mask=there)
    tl.store(stats + 2 * stride + row, (entropy + nan).to(tl.float32), mask=there)
    tl.store(stats + 3 * stride + row, (divergence + nan).to(tl.float32), mask=there)
    tl.store(stats + 4 * stride + row, (label_log_prob + nan).to(tl.float32), mask=there)

    # what the classes of a row meet of its numbers
    b0, b1, a2 = (linear / s).to(REAL)[:, None], (logarithmic / s).to(REAL)[:, None], (-tau2 / s2).to(REAL)[:, None]
    c0, at_top = constant.to(REAL)[:, None], at_top.to(REAL)[:, None]
    at_label = tl.where(has_label, at_label, tau1).to(REAL)[:, None]
    for start in range(0, end, BLOCK):
        if not FITS:
            f, others = _tile(logits, row, start, label, batch, classes, row_stride, class_stride, BLOCK)
        d = _exponents(f, top, REAL)
        e, e2 = tl.exp(d), tl.exp(tau2.to(tl.float32) * d.to(tl.float32))
        g = b0 * e + b1 * (e * d) + a2 * e2 + c0
        if HAS_TERMS:
            w, _ = _class_terms(e, d, q.to(REAL)[:, None], log_q.to(REAL)[:, None], order, DIVERGENCE)
            term = scale.to(REAL)[:, None] * _centred(w, e, pull.to(REAL)[:, None])
            g -= tl.where(alpha == 0.0, 0.0, term)
        g = tl.where(d == 0.0, at_top, g)
        column = start + tl.arange(0, BLOCK)[None, :]
        # a masked class has no gradient
        g = tl.where(others, g, tl.where(column == label[:, None], at_label, 0.0))
        g = tl.where(spoilt[:, None], float("nan"), g).to(tl.float32).to(grad.dtype.element_ty)
        tl.store(grad + row[:, None] * classes + column, g, mask=there[:, None] & (column < classes))


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
    """Gradient (B, C) in the logits' dtype and statistics (5, B) fp32; NaN in both for a label out of range."""
    batch, classes = logits.shape
    row_stride, class_stride = logits.stride()
    grad = torch.empty((batch, classes), dtype=logits.dtype, device=logits.device) if out is None else out
    stats = torch.empty((5, batch), dtype=torch.float32, device=logits.device)
    if not batch:
        return grad, stats
    in_double = divergence in _IN_DOUBLE
    rows, block = tile_shape(classes, NARROWEST, WIDEST)
    group = math.gcd(classes, row_stride, 16)
    with device_of(logits):
        _guidance_kernel[(triton.cdiv(batch, rows),)](
            logits, labels, grad, stats, batch, classes // group, row_stride // group, class_stride, labels.stride(0),
            *doubles(order, alpha, epsilon, joint_temperature, marginal_temperature, entropy_weight),
            DIVERGENCE=divergence, ADAPTIVE=adaptive_entropy, REAL=tl.float64 if in_double else tl.float32,
            ROWS=rows, BLOCK=block, FITS=block >= classes, GROUP=group,
            num_warps=min(max(LEAST_WARPS, rows * block // 256), MOST_WARPS), num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
    return grad, stats
