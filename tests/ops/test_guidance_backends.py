"""Every backend against the float64 definition, over dtype × shape × stride × divergence × extremes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from formulas import NAMES, assert_near, literal

from calguide_fast import guidance_gradient, guidance_score, use_backend
from calguide_fast.backends import reference
from calguide_fast.ops.guidance import gradient_and_stats, guidance_settings

FACTORS = {
    "divergence": NAMES,
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "num_classes": [1, 2, 10, 37, 1000, 1001, 21843],
    "batch": [0, 1, 3, 199],
    "strides": ["contiguous", "transposed", "sliced", "expanded"],
    "kind": ["ordinary", "flat", "saturated", "gap 200", "gap 300", "masked", "masked label", "spoilt"],
    "settings": ["default", "no label", "unit temperatures", "zero marginal", "entropy", "adaptive", "one-hot"],
}
SETTINGS = {
    "default": {},
    "no label": {"epsilon": 0.0, "alpha": 1.7},
    "unit temperatures": {"marginal_temperature": 1.0},
    "zero marginal": {"marginal_temperature": 0.0, "joint_temperature": 1.5},
    "entropy": {"entropy_weight": 0.8, "alpha": 0.5},
    "adaptive": {"entropy_weight": 0.8, "adaptive_entropy": True, "marginal_temperature": 0.7},
    "one-hot": {"epsilon": 1.0},
}
INFINITE_AT_ONE_HOT = ("forward_kl", "jeffreys", "chi2", "alpha:1.5", "alpha:2", "alpha:3")
# relative to max(1, |·|), for every divergence
TOLERANCE = 5e-6
EXPLOSIVE = ("neyman_chi2", "alpha:-1")


def covering(factors: dict[str, list]) -> list[tuple]:
    """Rows in which every pair of values of two factors occurs, chosen greedily; the same rows every time."""
    rng = random.Random(0)
    columns = list(factors.values())
    pairs = list(itertools.combinations(range(len(columns)), 2))
    open_pairs = {(i, a, j, b) for i, j in pairs for a in range(len(columns[i])) for b in range(len(columns[j]))}
    rows = []
    while open_pairs:
        i, a, j, b = min(open_pairs)
        best, best_new = None, -1
        for _ in range(40):
            row = [rng.randrange(len(column)) for column in columns]
            row[i], row[j] = a, b
            new = sum((x, row[x], y, row[y]) in open_pairs for x, y in pairs)
            if new > best_new:
                best, best_new = row, new
        open_pairs -= {(x, best[x], y, best[y]) for x, y in pairs}
        rows.append(tuple(column[value] for column, value in zip(columns, best)))
    return rows


PAIRWISE = covering(FACTORS)


def row_id(row: tuple) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(" ", "_") for value in row)


def make_logits(kind: str, batch: int, num_classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous (B, C) logits that a dtype can hold, and labels."""
    logits = torch.randn(batch, num_classes) * 3
    labels = torch.randint(num_classes, (batch,))
    rows = torch.arange(batch)
    top = torch.randint(num_classes, (batch,))
    if kind == "flat":
        logits = 5 + torch.randn(batch, num_classes) * 1e-3
    elif kind == "saturated":
        logits[rows, labels] += 30
    elif kind.startswith("gap"):
        logits[rows, top] += float(kind.removeprefix("gap"))
    elif kind.startswith("masked"):
        hidden = torch.rand(batch, num_classes) < 0.4
        # one class stays, and the label's place is what the case is about
        hidden[rows, (labels + 1) % num_classes] = False
        hidden[rows, labels] = kind == "masked label" and num_classes > 1
        logits[hidden] = -math.inf
    elif kind == "spoilt" and num_classes > 1:
        logits[rows, top] = torch.tensor([math.nan, math.inf, 0.0])[rows % 3]
        logits[rows % 5 == 4] = -math.inf
    return logits.to(dtype), labels


def with_strides(logits: torch.Tensor, strides: str) -> torch.Tensor:
    """The same values in another layout; an expanded tensor repeats its first row."""
    batch, num_classes = logits.shape
    if strides == "transposed":
        return logits.t().contiguous().t()
    if strides == "sliced":
        return torch.zeros(batch, 3, 2 * num_classes + 1, dtype=logits.dtype)[:, 1, 1::2].copy_(logits)
    if strides == "expanded":
        return logits[:1].expand(batch, num_classes) if batch else logits
    return logits


def expected_row(row: torch.Tensor, label: int, settings: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """G and the five scalars of one float64 row, from the definition; None where the row is spoilt."""
    if row.isnan().any() or (row == math.inf).any() or (row == -math.inf).all():
        return None
    kept = (row > -math.inf).nonzero()[:, 0]
    grad = torch.zeros_like(row)
    if row[label] == -math.inf:
        # the target is uniform over the others and the label's term stands alone, at minus infinity
        others = {**settings, "epsilon": 0.0, "joint_temperature": 0.0}
        found = literal(row[None, kept], torch.tensor([0]), **others)
        grad[kept] = found.grad[0]
        grad[label] = settings.get("joint_temperature", 1.0)
        infinite = torch.tensor([-math.inf], dtype=row.dtype)
        return grad, torch.cat([infinite, infinite, found.entropy, found.divergence, infinite])
    place = int((kept == label).nonzero())
    found = literal(row[None, kept], torch.tensor([place]), **settings)
    grad[kept] = found.grad[0]
    label_log_prob = row[kept].log_softmax(0)[place]
    return grad, torch.cat([found.score, found.log_prob, found.entropy, found.divergence, label_log_prob[None]])


def check(divergence, dtype, num_classes, batch, strides, kind, settings):
    if settings == "one-hot" and divergence in INFINITE_AT_ONE_HOT:
        settings = "default"
    chosen = {"divergence": divergence, **SETTINGS[settings]}
    logits, labels = make_logits(kind, batch, num_classes, dtype)
    logits = with_strides(logits, strides)
    if strides == "expanded":
        labels = labels[:1].expand(batch)
    grad, stats = gradient_and_stats(logits, labels, guidance_settings(**{**DEFAULTS, **chosen}))
    assert grad.dtype == dtype and grad.shape == (batch, num_classes) and grad.is_contiguous()
    assert stats.dtype == torch.float32 and stats.shape == (5, batch) and stats.is_contiguous()

    if kind in ("ordinary", "flat", "saturated", "gap 200", "gap 300"):
        expected = literal(logits, labels, **chosen)
        label_log_prob = logits.double().log_softmax(1)[range(batch), labels]
        wanted_grad, wanted = expected.grad, torch.stack([*expected[1:], label_log_prob])
        good = slice(None)
    else:
        # row by row, as masks differ; some rows are enough
        rows = list(range(min(batch, 12)))
        found = [expected_row(logits[b].double(), int(labels[b]), chosen) for b in rows]
        for b in rows:
            if found[b] is None:
                assert grad[b].isnan().all() and stats[:, b].isnan().all(), f"row {b} should be NaN"
        good = [b for b in rows if found[b] is not None]
        if not good:
            return
        wanted_grad = torch.stack([found[b][0] for b in good])
        wanted = torch.stack([found[b][1] for b in good], 1)
    assert_near(grad[good], wanted_grad, TOLERANCE, "grad")
    for name, row, expected_scalar in zip(("score", "log_prob", "entropy", "divergence", "label"), stats, wanted):
        assert_near(row[good], expected_scalar, TOLERANCE, name)


DEFAULTS = {
    "divergence": "js",
    "alpha": 1.0,
    "epsilon": 0.9,
    "joint_temperature": 1.0,
    "marginal_temperature": 0.5,
    "entropy_weight": 0.0,
    "adaptive_entropy": False,
}


@pytest.mark.parametrize("row", PAIRWISE, ids=row_id)
def test_pairwise(row, backend):
    check(*row)


@pytest.mark.full
@pytest.mark.parametrize("settings", FACTORS["settings"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
@pytest.mark.parametrize("divergence", NAMES)
def test_full_grid(divergence, dtype, settings, backend):
    for num_classes, batch, strides, kind in itertools.product(
        FACTORS["num_classes"], FACTORS["batch"], FACTORS["strides"], FACTORS["kind"]
    ):
        # the largest shape in one layout and kind: it differs from 199×1001 and 3×21843 in nothing but time
        if num_classes * batch > 1e6 and (strides, kind) != ("contiguous", "ordinary"):
            continue
        try:
            check(divergence, dtype, num_classes, batch, strides, kind, settings)
        except AssertionError as error:
            raise AssertionError(f"{num_classes=} {batch=} {strides=} {kind=}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
def test_half_precision_error_is_at_most_eager_pytorchs(divergence, dtype, backend):
    logits = (torch.randn(64, 1000) * 3).to(dtype)
    labels = torch.randint(1000, (64,))
    exact = literal(logits, labels, divergence=divergence).grad
    p, p2 = logits.softmax(1), (0.5 * logits).softmax(1)
    onehot = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    q = 0.1 / 1000 + 0.9 * onehot
    w = {"reverse_kl": -q, "forward_kl": p * ((p / q).log() + 1), "js": p * (2 * p / (p + q)).log() / 2}[divergence]
    # fp16's p underflows to 0, where the plain formula's 0·log 0 is NaN
    eager = onehot - 0.5 * p2 - (w.nan_to_num() - p * w.nan_to_num().sum(1, keepdim=True))
    error = (guidance_gradient(logits, labels, divergence).grad.double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max()


@pytest.mark.parametrize("divergence", NAMES)
def test_large_gaps_stay_finite(divergence, backend):
    labels = torch.tensor([0, 1])
    for gap in (95.0, 200.0, 300.0, 3000.0):
        logits = torch.zeros(2, 10)
        logits[:, 0] = gap
        found = guidance_gradient(logits, labels, divergence, entropy_weight=1.0)
        for name, value in found._asdict().items():
            assert not value.isnan().any(), f"{name} at a gap of {gap}"
            if divergence not in EXPLOSIVE:
                assert value.isfinite().all(), f"{name} at a gap of {gap}"


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_spoilt_row_is_nan_and_leaves_the_others_alone(divergence, bad, alpha, backend):
    logits = torch.randn(5, 37)
    labels = torch.randint(37, (5,))
    clean = guidance_gradient(logits, labels, divergence, alpha=alpha)
    for column in (0, 17, 36, int(labels[2])):
        spoilt = logits.clone()
        spoilt[2, column] = bad
        found = guidance_gradient(spoilt, labels, divergence, alpha=alpha)
        for after, before in zip(found, clean):
            assert after[2].isnan().all()
            assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_masked_classes_are_as_good_as_absent(backend):
    logits = torch.randn(4, 30)
    kept = torch.arange(0, 30, 3)
    places = torch.tensor([0, 3, 9, 5])
    masked = torch.full_like(logits, -math.inf)
    masked[:, kept] = logits[:, kept]
    settings = {"entropy_weight": 0.6, "adaptive_entropy": True}
    found = guidance_gradient(masked, kept[places], **settings)
    dropped = guidance_gradient(logits[:, kept].contiguous(), places, **settings)
    assert_near(found.grad[:, kept], dropped.grad.double(), 1e-6)
    gone = torch.ones(30, dtype=torch.bool)
    gone[kept] = False
    assert (found.grad[:, gone] == 0).all()
    for after, before in zip(found[1:], dropped[1:]):
        assert_near(after, before.double(), 1e-6)


@pytest.mark.parametrize("divergence", [name for name in NAMES if name not in ("reverse_kl", "jeffreys", *EXPLOSIVE)])
@pytest.mark.parametrize("num_classes", [10, 1000, 1500])
def test_the_lowest_finite_logit_is_a_class_of_no_probability(divergence, num_classes, backend):
    """As where finfo.min stands for a mask: the class stays in q, so that it is not one that is absent."""
    logits, labels = torch.randn(3, num_classes), torch.tensor([1, 5, 9])
    logits[:, 2:6] = torch.finfo(torch.float32).min
    found = guidance_gradient(logits, labels, divergence, entropy_weight=0.5)
    far = logits.clone()
    far[:, 2:6] = -300
    expected = literal(far, labels, divergence=divergence, entropy_weight=0.5)
    assert_near(found.grad, expected.grad, TOLERANCE)
    assert_near(found.divergence, expected.divergence, TOLERANCE)
    assert_near(found.entropy, expected.entropy, TOLERANCE)


@pytest.mark.parametrize("num_classes", [3, 17, 18, 40])
@pytest.mark.parametrize("settings", [("forward_kl", 2.0, 0.0), ("jeffreys", 2.0, 0.0), ("none", 0.0, 2.0)])
def test_the_lowest_finite_logit_is_nothing_at_any_weight(settings, num_classes, backend):
    divergence, alpha, entropy_weight = settings
    logits, labels = torch.randn(2, num_classes), torch.tensor([0, 1])
    # within the last vector of a CPU's, and before it
    logits[0, -1] = logits[1, num_classes // 2] = torch.finfo(torch.float32).min
    weights = {"alpha": alpha, "entropy_weight": entropy_weight}
    found = guidance_gradient(logits, labels, divergence, **weights)
    with use_backend("reference"):
        expected = guidance_gradient(logits.double(), labels, divergence, **weights)
    assert_near(found.grad, expected.grad, TOLERANCE)


@pytest.mark.parametrize("num_classes", [2, 11, 40])
@pytest.mark.parametrize("divergence", NAMES)
def test_a_steep_marginal_temperature(divergence, num_classes, backend):
    logits, labels = torch.randn(3, num_classes), torch.tensor([0, 1, 1])
    for temperature in (1e7, 1e30):
        settings = {"divergence": divergence, "joint_temperature": 0.0, "marginal_temperature": temperature}
        found = guidance_gradient(logits, labels, **settings)
        with use_backend("reference"):
            expected = guidance_gradient(logits.double(), labels, **settings)
        # of what is left beside the largest class's -temperature
        assert_near(found.grad / temperature, expected.grad / temperature, TOLERANCE)
        assert_near(found.log_prob / temperature, expected.log_prob / temperature, TOLERANCE)
        assert_near(found.entropy, expected.entropy, TOLERANCE)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e38, -2e37])
@pytest.mark.parametrize("divergence", NAMES)
def test_rows_at_the_end_of_floats(divergence, lowest, temperature, backend):
    """Only differences of logits count, but for what the joint temperature multiplies."""
    logits, labels = torch.zeros(2, 11), torch.tensor([0, 10])
    settings = {"divergence": divergence, "epsilon": 0.5, "joint_temperature": temperature}
    settings["marginal_temperature"] = temperature
    found = guidance_gradient(torch.full_like(logits, lowest), labels, **settings)
    with use_backend("reference"):
        expected = guidance_gradient(logits.double(), labels, **settings)
    assert_near(found.grad, expected.grad, TOLERANCE)
    assert_near(found.entropy, expected.entropy, TOLERANCE)
    assert_near(found.divergence, expected.divergence, TOLERANCE)
    # which takes the two terms of the definition by themselves, and beside them rounds log 11 away
    if backend != "reference":
        assert_near(found.log_prob, expected.log_prob, TOLERANCE)


def test_a_label_beyond_the_range_of_floats_below_the_others_is_finite(backend):
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 7] = torch.finfo(torch.float32).min, 1e38
    for divergence in ("none", "forward_kl", "js", "hellinger", "chi2"):
        found = guidance_gradient(logits, torch.tensor([3]), divergence)
        assert found.grad.isfinite().all() and found.divergence.isfinite().all(), divergence
        assert not found.score.isnan().any()


@pytest.mark.parametrize("divergence", NAMES)
def test_a_mask_costs_no_digits(divergence, backend):
    logits, labels = torch.randn(4, 300) * 15, torch.randint(1, 300, (4,))
    logits[:, 0] = -math.inf
    found = guidance_gradient(logits, labels, divergence)
    expected = literal(logits[:, 1:], labels - 1, divergence=divergence)
    assert_near(found.grad[:, 1:], expected.grad, TOLERANCE)
    assert_near(found.divergence, expected.divergence, TOLERANCE)


@pytest.mark.parametrize("shape", [(3, 10), (199, 37), (0, 10)])
@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
def test_out_is_written_and_returned(shape, dtype, backend):
    logits, labels = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    out = torch.empty(shape, dtype=dtype)
    found = guidance_gradient(logits, labels, out=out)
    assert found.grad is out
    assert torch.equal(out, guidance_gradient(logits, labels).grad)


def test_inputs_are_left_alone_and_results_repeat(backend):
    logits, labels = torch.randn(9, 1000), torch.randint(1000, (9,))
    before = logits.clone(), labels.clone()
    first, second = guidance_gradient(logits, labels), guidance_gradient(logits, labels)
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_do_not_depend_on_their_neighbours(backend):
    logits, labels = torch.randn(199, 1001), torch.randint(1001, (199,))
    together = guidance_gradient(logits, labels, entropy_weight=0.5)
    alone = guidance_gradient(logits[57:58], labels[57:58], entropy_weight=0.5)
    for a, b in zip(alone, together):
        assert_near(a[0], b[57].double(), 1e-7)


def test_threads_change_no_bit(two_threads):
    logits, labels = torch.randn(199, 1001), torch.randint(1001, (199,))
    two = guidance_gradient(logits, labels, entropy_weight=0.5)
    torch.set_num_threads(1)
    one = guidance_gradient(logits, labels, entropy_weight=0.5)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_strided_labels_and_other_integer_types(backend):
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    expected = guidance_gradient(logits, labels).grad
    spread = torch.full((6, 2), -1)
    spread[:, 1] = labels
    for variant in (spread[:, 1], labels.int(), labels.to(torch.uint8)):
        assert torch.equal(guidance_gradient(logits, variant).grad, expected)


@pytest.mark.parametrize("label", [-1, 10, -(2**40), 2**40])
def test_a_label_out_of_range_names_row_value_and_range(label, backend):
    out = torch.full((4, 10), 7.0)
    if backend in ("cuda", "triton"):
        # a look at the labels would wait for the device: their rows are spoilt instead
        grad, *scalars = guidance_gradient(torch.randn(4, 10), torch.tensor([1, 2, label, 99]), out=out)
        assert all(
            found.isnan().view(4, -1).all(1).tolist() == [False, False, True, True] for found in (grad, *scalars)
        )
        return
    with pytest.raises(ValueError, match=rf"labels\[2\]={label} is out of range.*0\.\.9"):
        guidance_gradient(torch.randn(4, 10), torch.tensor([1, 2, label, 99]), out=out)
    assert (out == 7).all(), "nothing may be written before the labels are known to be good"


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
def test_score_and_its_backward_are_the_closed_form(dtype, backend):
    logits, labels = (torch.randn(5, 37) * 3).to(dtype).requires_grad_(), torch.randint(37, (5,))
    settings = {"divergence": "forward_kl", "entropy_weight": 0.3}
    score = guidance_score(logits, labels, **settings)
    expected = guidance_gradient(logits.detach(), labels, **settings)
    assert torch.equal(score, expected.score)
    (grad,) = torch.autograd.grad(score.sum(), logits, retain_graph=True)
    assert torch.equal(grad, expected.grad)
    (grad,) = torch.autograd.grad(score, logits, torch.full((5,), 2.0))
    assert torch.equal(grad, 2 * expected.grad)


def test_score_is_differentiable_once(backend):
    logits, labels = torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])
    (grad,) = torch.autograd.grad(guidance_score(logits, labels).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="guidance_score is differentiable once"):
        (grad.sum() + logits.sum()).backward()
    first = torch.func.grad(lambda f: guidance_score(f, labels).sum())
    for second in (torch.func.grad(lambda f: first(f).sum()), torch.func.jacrev(first)):
        with pytest.raises(NotImplementedError, match="guidance_score is differentiable once"):
            second(logits.detach())


def test_gradient_is_cut_off_from_autograd(backend):
    logits = torch.randn(2, 5, requires_grad=True)
    assert not any(value.requires_grad for value in guidance_gradient(logits, torch.tensor([0, 1])))


def test_reference_is_float64_for_float64():
    found = guidance_gradient(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))
    assert all(value.dtype == torch.float64 for value in found)
    assert set(reference.__all__) <= set(vars(reference))


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
@pytest.mark.parametrize("divergence", NAMES)
def test_reference_rounds_once(divergence, dtype):
    logits, labels = (torch.randn(16, 1000) * 3).to(dtype), torch.randint(1000, (16,))
    with use_backend("reference"):
        found = guidance_gradient(logits, labels, divergence)
    expected = literal(logits, labels, divergence=divergence)
    assert found.grad.dtype == dtype and found.score.dtype == torch.float32
    for got, wanted in zip(found, expected):
        assert_near(got, wanted, 1e-11)


@pytest.mark.gpu
def test_gpu_agrees_with_the_definition():
    logits, labels = torch.randn(64, 1000, device="cuda") * 3, torch.randint(1000, (64,), device="cuda")
    for divergence in NAMES:
        found = guidance_gradient(logits, labels, divergence)
        expected = literal(logits.cpu(), labels.cpu(), divergence=divergence)
        assert_near(found.grad.cpu(), expected.grad, 5e-6)
        assert_near(found.score.cpu(), expected.score, 5e-6)
