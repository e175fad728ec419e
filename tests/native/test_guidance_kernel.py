"""The CPU guidance kernel against the definition of the score and float64 autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from calguide_fast.backends import cpu
from calguide_fast.ops.divergences import CODES

NONE, REVERSE_KL, FORWARD_KL, JS, JEFFREYS, HELLINGER, CHI2, NEYMAN_CHI2, ALPHA = range(9)
NAMES = ["none", "reverse_kl", "forward_kl", "js", "jeffreys", "hellinger", "chi2", "neyman_chi2", "alpha"]
CASES = [(code, 0.0) for code in range(8)] + [(ALPHA, a) for a in (-0.5, 0.3, 0.7, 1.5, 3.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def phi(t, code, a):
    if code == REVERSE_KL:
        return -t.log()
    if code == FORWARD_KL:
        return t * t.log()
    if code == JS:
        return 0.5 * (t * t.log() - (t + 1) * ((t + 1) / 2).log())
    if code == JEFFREYS:
        return (t - 1) * t.log()
    if code == HELLINGER:
        return (t.sqrt() - 1) ** 2
    if code == CHI2:
        return (t - 1) ** 2
    if code == NEYMAN_CHI2:
        return (1 - t) ** 2 / t
    return (t**a - a * t + a - 1) / (a * (a - 1))


def restatement(
    logits, labels, code, order=0.0, alpha=1.0, epsilon=0.9, joint=1.0, marginal=0.5, weight=0.0, adaptive=False
):
    """The score from its definition and its gradient by autograd, both in float64."""
    f = logits.double().detach().requires_grad_()
    classes = f.shape[1]
    q = torch.full_like(f, (1 - epsilon) / classes).scatter_add(
        1, labels[:, None], torch.full((len(labels), 1), float(epsilon), dtype=f.dtype)
    )
    log_p = f.log_softmax(1)
    p = log_p.exp()
    label_logit = f.gather(1, labels[:, None])[:, 0]
    log_prob = joint * label_logit - (marginal * f).logsumexp(1)
    entropy = -(p * log_p).sum(1)
    divergence = torch.zeros_like(entropy) if code == NONE else (q * phi(p / q, code, order)).sum(1)
    if adaptive and classes > 1:
        weight = weight * (1 - entropy.detach() / math.log(classes))
    score = log_prob - alpha * divergence + weight * entropy
    (grad,) = torch.autograd.grad(score.sum(), f)
    label_log_prob = log_p.gather(1, labels[:, None])[:, 0]
    return grad, torch.stack([score, log_prob, entropy, divergence, label_log_prob]).detach()


def kernel(
    logits,
    labels,
    code,
    order=0.0,
    alpha=1.0,
    epsilon=0.9,
    joint=1.0,
    marginal=0.5,
    weight=0.0,
    adaptive=False,
    out=None,
):
    return cpu.guidance_gradient(logits, labels, code, order, alpha, epsilon, joint, marginal, weight, adaptive, out)


def error(actual, expected):
    """Largest error relative to max(1, |expected|); a NaN anywhere is infinite."""
    if actual.numel() == 0:
        return 0.0
    relative = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    return relative.nan_to_num(nan=math.inf).max().item()


def batch(rows, classes, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def name(case):
    return NAMES[case[0]] + (f":{case[1]}" if case[0] == ALPHA else "")


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("marginal", [0.5, 1.0, 0.0, 0.8])
@pytest.mark.parametrize("classes", [1, 2, 10, 37, 1000])
def test_matches_autograd(case, marginal, classes):
    logits, labels = batch(7, classes)
    settings = {"alpha": 0.7, "joint": 1.2, "marginal": marginal, "weight": 0.4, "adaptive": classes != 37}
    grad, stats = kernel(logits, labels, *case, **settings)
    expected_grad, expected_stats = restatement(logits, labels, *case, **settings)
    assert error(grad, expected_grad) < 5e-6
    assert error(stats, expected_stats) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("marginal", [0.5, 1.0, 0.7])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_every_element_is_exact_to_float(case, alpha, marginal):
    for seed, classes in enumerate((2, 10, 37, 1000)):
        for rows in (1, 64):
            logits, labels = batch(rows, classes, seed=seed)
            grad, stats = kernel(logits, labels, *case, alpha=alpha, marginal=marginal)
            expected_grad, expected_stats = restatement(logits, labels, *case, alpha=alpha, marginal=marginal)
            assert error(grad, expected_grad) < 2e-6
            assert error(stats, expected_stats) < 2e-6


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("rows, classes", [(0, 10), (3, 1001), (199, 37), (3, 21843)])
def test_odd_shapes(case, rows, classes):
    logits, labels = batch(rows, classes)
    grad, stats = kernel(logits, labels, *case)
    assert grad.shape == (rows, classes) and stats.shape == (5, rows)
    expected_grad, expected_stats = restatement(logits, labels, *case)
    assert error(grad, expected_grad) < 5e-6
    assert error(stats, expected_stats) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradient_sums_to_temperature_difference(case):
    logits, labels = batch(16, 100)
    grad, stats = kernel(logits, labels, *case, joint=1.3, marginal=0.5, weight=0.2)
    scale = grad.double().abs().sum(1).clamp(min=1)
    assert ((grad.double().sum(1) - 0.8).abs() / scale).max() < 2e-6
    assert (stats[3] >= 0).all()


@pytest.mark.parametrize("order", [1e-3, 0.999, 1.001, -1e-3, 0.5, 2.0])
def test_alpha_near_its_limits(order):
    logits, labels = batch(8, 50)
    grad, stats = kernel(logits, labels, ALPHA, order)
    expected_grad, expected_stats = restatement(logits, labels, ALPHA, order)
    assert error(grad, expected_grad) < 1e-5
    assert error(stats, expected_stats) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=name)
def test_p_equal_to_q(case):
    labels = torch.tensor([3, 0])
    grad, stats = kernel(torch.full((2, 40), 5.0), labels, *case, epsilon=0.0, joint=1.0, marginal=1.0)
    base, _ = kernel(torch.full((2, 40), 5.0), labels, NONE, marginal=1.0)
    assert stats[3].abs().max() < 2e-6
    assert (grad - base).abs().max() < 1e-6


@pytest.mark.parametrize("code", [NONE, REVERSE_KL, JS, HELLINGER, NEYMAN_CHI2, ALPHA], ids=lambda code: NAMES[code])
def test_one_hot_target(code):
    logits, labels = batch(6, 20)
    order = 0.4 if code == ALPHA else 0.0
    grad, stats = kernel(logits, labels, code, order, epsilon=1.0)
    if code in (REVERSE_KL, JS, NEYMAN_CHI2):
        near_grad, near_stats = restatement(logits, labels, code, epsilon=1 - 1e-9)
    else:
        near_grad, near_stats = restatement(logits, labels, code, order, epsilon=1 - 1e-15)
    assert error(grad, near_grad) < 1e-5
    assert error(stats, near_stats) < 1e-5
    if code == REVERSE_KL:
        assert torch.allclose(stats[3], -stats[4], rtol=1e-6)


def test_saturated_label_keeps_its_digits():
    logits = torch.zeros(1, 3)
    logits[0, 1] = 20.7
    labels = torch.tensor([1])
    for code, order in CASES:
        # neyman_chi2 is dominated by 1 / p, reverse KL and negative orders by q: all far from 0
        grad, _ = kernel(logits, labels, code, order, marginal=1.0, weight=0.3)
        expected, _ = restatement(logits, labels, code, order, marginal=1.0, weight=0.3)
        assert ((grad - expected).abs() / expected.abs()).max() < 2e-5, name((code, order))


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in (JS, HELLINGER, CHI2, ALPHA)], ids=name)
@pytest.mark.parametrize("gap", [5.0, 9.0, 10.5, 14.0, 20.0])
@pytest.mark.parametrize("classes, place", [(3, 0), (40, 39), (1500, 0), (1500, 700)])
def test_saturated_other_class_keeps_its_digits(case, gap, classes, place):
    logits, labels = batch(4, classes, 0.5)
    logits[:, place] += gap
    labels[:] = 1
    # without a marginal term nothing hides the small gradient of the class that is nearly certain
    grad, _ = kernel(logits, labels, *case, marginal=0.0, joint=0.0)
    expected, _ = restatement(logits, labels, *case, marginal=0.0, joint=0.0)
    assert ((grad - expected)[:, place].abs() / expected[:, place].abs()).max() < 1e-5


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("marginal", [0.5, 1.0, 0.8])
def test_invalid_rows_are_nan_and_alone(case, marginal):
    logits, labels = batch(6, 33)
    clean_grad, clean_stats = kernel(logits, labels, *case, marginal=marginal)
    spoilt = logits.clone()
    spoilt[1, 5] = math.nan
    spoilt[2, 32] = math.inf
    spoilt[3] = -math.inf
    spoilt[4, 0], spoilt[4, 1] = -math.inf, math.nan
    grad, stats = kernel(spoilt, labels, *case, marginal=marginal)
    assert grad[1:5].isnan().all() and stats[:, 1:5].isnan().all()
    for row in (0, 5):
        assert torch.equal(grad[row], clean_grad[row]) and torch.equal(stats[:, row], clean_stats[:, row])


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("marginal", [0.5, 0.0, 0.8])
def test_masked_classes_do_not_exist(case, marginal):
    logits, labels = batch(5, 30)
    labels[:] = 7
    kept = [i for i in range(30) if i not in (0, 3, 29)]
    masked = logits.clone()
    masked[:, [0, 3, 29]] = -math.inf
    settings = {"marginal": marginal, "weight": 0.3, "adaptive": True}
    grad, stats = kernel(masked, labels, *case, **settings)
    dropped_grad, dropped_stats = restatement(logits[:, kept], labels - 2, *case, **settings)
    assert (grad[:, [0, 3, 29]] == 0).all()
    assert error(grad[:, kept], dropped_grad) < 5e-6
    assert error(stats, dropped_stats) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=name)
def test_masked_label(case):
    logits, labels = batch(4, 12)
    labels[:] = 5
    logits[:, [5, 8]] = -math.inf
    kept = [i for i in range(12) if i not in (5, 8)]
    grad, stats = kernel(logits, labels, *case, joint=1.0, marginal=0.5, weight=0.3)
    assert (stats[[0, 1, 4]] == -math.inf).all()
    assert (grad[:, 5] == 1).all() and (grad[:, 8] == 0).all()
    # the finite classes: a uniform q, and no label to push toward
    none = torch.zeros(4, dtype=torch.long)
    expected_grad, expected_stats = restatement(
        logits[:, kept], none, *case, epsilon=0.0, joint=0.0, marginal=0.5, weight=0.3
    )
    assert error(grad[:, kept], expected_grad) < 5e-6
    assert error(stats[2:4], expected_stats[2:4]) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("gap", [90.0, 200.0, 300.0, 1e6, 1e16, 1e22, 1e28, 1e38, 3e38])
def test_large_gaps(case, gap):
    logits = torch.zeros(3, 21)
    logits[0, 2], logits[1, 4], logits[2, 4:6] = gap, gap, -gap
    labels = torch.tensor([2, 2, 2])
    for marginal in (0.5, 1.0, 0.8, 0.0):
        grad, stats = kernel(logits, labels, *case, marginal=marginal, weight=0.1)
        explodes = case[0] == NEYMAN_CHI2 or case[1] < 0
        assert not grad.isnan().any() and not stats.isnan().any()
        if not explodes:
            assert grad.isfinite().all()
            if gap <= 300:
                assert stats.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_dtypes(dtype, case):
    logits, labels = batch(9, 130)
    grad, stats = kernel(logits.to(dtype), labels, *case)
    expected_grad, expected_stats = restatement(logits.to(dtype), labels, *case)
    assert grad.dtype is dtype and stats.dtype is torch.float32
    assert error(stats, expected_stats) < 5e-6
    # one rounding to the storage type and what the kernel adds before it
    rounding = (grad.double() - expected_grad).abs() / expected_grad.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    tolerance = 0.51 * torch.finfo(dtype).eps
    floor = (grad.double() - expected_grad).abs() < 5e-6 * expected_grad.abs().clamp(min=1)
    # a neyman_chi2 of float16 goes beyond 65504
    overflow = (expected_grad.abs() > torch.finfo(dtype).max) & (grad.double() == expected_grad.sign() * math.inf)
    assert (floor | overflow | (rounding < tolerance)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_value_survives(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    finite = values.isfinite()
    # one class: the logit passes through log_prob = tau1 f - tau2 f at tau1 = 2, tau2 = 1
    logits = bits.view(dtype)[:, None]
    _, stats = kernel(logits, torch.zeros(len(bits), dtype=torch.long), NONE, joint=2.0, marginal=1.0)
    assert torch.equal(stats[1][finite], values[finite])
    assert stats[1][~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("alpha", [1e-4, 1.0, 1e6])
def test_16_bits_are_loaded_and_rounded_as_torch_does(dtype, alpha):
    # every finite value beside its neighbours, and gradients from subnormal ones to those beyond the range
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    near = every[every.isfinite()].float().sort().values.to(dtype).view(-1, 32)
    for logits in (near, batch(64, 1000)[0].to(dtype)):
        labels = torch.arange(len(logits)) % logits.shape[1]
        grad, stats = kernel(logits, labels, REVERSE_KL, alpha=alpha)
        expected, expected_stats = kernel(logits.float(), labels, REVERSE_KL, alpha=alpha)
        assert torch.equal(grad, expected.to(dtype)) and torch.equal(stats, expected_stats)
    assert grad.isinf().any() == (alpha == 1e6 and dtype is torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    logits, labels = batch(12, 45)
    logits = logits.to(dtype)
    expected = kernel(logits, labels, JS)
    spaced = torch.full((24, 90), math.nan, dtype=dtype)[::2, ::2]
    spaced.copy_(logits)
    column_major = logits.t().contiguous().t()
    reversed_labels = torch.stack([labels, labels + 1], 1)[:, 0]
    for view in (spaced, column_major):
        grad, stats = kernel(view, reversed_labels, JS)
        assert grad.is_contiguous()
        assert torch.equal(grad, expected[0]) and torch.equal(stats, expected[1])
    one = logits[:1].expand(12, 45)
    grad, _ = kernel(one, labels[:1].expand(12), JS)
    assert torch.equal(grad, expected[0][:1].expand(12, 45))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_out_and_in_place(case):
    logits, labels = batch(5, 50)
    expected, _ = kernel(logits, labels, *case)
    out = torch.full_like(logits, math.nan)
    grad, _ = kernel(logits, labels, *case, out=out)
    assert grad is out and torch.equal(out, expected)
    kernel(logits, labels, *case, out=logits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("label, row", [(-1, 2), (10, 1), (2**40, 0)])
def test_label_out_of_range_writes_nothing(label, row):
    logits, labels = batch(4, 10)
    labels[row] = label
    out = torch.full_like(logits, 42.0)
    with pytest.raises(ValueError, match=rf"labels\[{row}\]={label} is out of range.*0\.\.9"):
        kernel(logits, labels, JS, out=out)
    assert (out == 42).all()


def test_the_kernel_has_the_codes_of_the_table_and_no_other():
    logits, labels = batch(2, 10)
    assert list(CODES.values()) == list(range(len(CODES)))
    for code in CODES.values():
        kernel(logits, labels, code, 1.5)
    for code in (-1, len(CODES), 2**20):
        with pytest.raises(ValueError, match=rf"divergence={code} is not a code .*0\.\.{len(CODES) - 1}"):
            kernel(logits, labels, code, 1.5)


@pytest.mark.parametrize("code", [REVERSE_KL, JS, NEYMAN_CHI2], ids=lambda code: NAMES[code])
def test_threads_and_repeats_give_the_same_bits(code):
    logits, labels = batch(199, 1001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(kernel(logits, labels, code))
    finally:
        torch.set_num_threads(before)
    for grad, stats in results[1:]:
        assert torch.equal(grad, results[0][0]) and torch.equal(stats, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_float32_whatever_the_default_dtype(dtype):
    logits, labels = batch(4, 10)
    expected, expected_stats = kernel(logits.to(dtype), labels, JS)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        grad, stats = kernel(logits.to(dtype), labels, JS)
    finally:
        torch.set_default_dtype(before)
    assert grad.dtype is dtype and stats.dtype is torch.float32
    assert torch.equal(grad, expected) and torch.equal(stats, expected_stats)


def test_alpha_zero_still_reports_the_divergence():
    logits, labels = batch(4, 10)
    logits[0, 0] = -300.0
    grad, stats = kernel(logits, labels, NEYMAN_CHI2, alpha=0.0)
    expected, _ = kernel(logits, labels, NONE)
    # the sums are taken in another order where a class without probability has infinite terms
    assert torch.allclose(grad, expected, rtol=1e-6, atol=1e-7)
    assert stats[3, 0] == math.inf and stats[0].isfinite().all()


@pytest.mark.skipif("CALGUIDE_CPU_ISA" in os.environ, reason="already a run for one instruction set")
@pytest.mark.parametrize("isa", [isa for isa in cpu._cpu.isas() if isa != cpu._cpu.isa()])
def test_other_instruction_sets(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(command, env=os.environ | {"CALGUIDE_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
