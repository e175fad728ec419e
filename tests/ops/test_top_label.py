"""top_label against softmax, argmax and comparison, and its gradient against autograd, all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near
from torch import Tensor

from calguide_fast import use_backend
from calguide_fast.backends import reference
from calguide_fast.calibration import predictions
from calguide_fast.ops.smooth_ece import smooth_ece_from_logits
from calguide_fast.ops.top_label import _gradient, top_label

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 10, 37, 1000, 1001, 21843]
STRIDES = ["contiguous", "transposed", "every other", "offset", "expanded"]
TOLERANCE = 1e-6


def with_strides(logits: Tensor, kind: str) -> Tensor:
    """The same values, laid out otherwise; all rows are the first one where they are expanded."""
    if kind == "transposed":
        return logits.t().contiguous().t()
    if kind == "every other":
        return logits.repeat_interleave(2, 1)[:, ::2]
    if kind == "offset":
        return torch.cat([logits[:, :1], logits], 1)[:, 1:]
    return logits[:1].expand_as(logits) if kind == "expanded" else logits


def sample(num_classes: int, dtype: torch.dtype, strides: str = "contiguous", n: int = 19) -> tuple[Tensor, Tensor]:
    """Logits, the middle ones rounded so that the largest has equals, and labels, half of them right."""
    logits = 4 * torch.randn(n, num_classes)
    logits[n // 3 : 2 * n // 3] = logits[n // 3 : 2 * n // 3].round().clamp(max=6.0)
    logits = with_strides(logits.to(dtype), strides)
    labels = torch.randint(num_classes, (n,))
    labels[::2] = logits[::2].argmax(1)
    return logits, labels


def confidence_and_gradient(logits: Tensor, top: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd in float64."""
    leaf = logits.detach().double().requires_grad_()
    confidence = leaf.softmax(1).gather(1, top[:, None]).squeeze(1)
    return confidence.detach(), torch.autograd.grad(confidence @ weight.double(), leaf)[0]


def grid() -> list:
    """Every dtype with some strides and number of classes in short, and all of them with all in full."""
    short = [
        pytest.param(DTYPES[(i + j) % 3], strides, num_classes)
        for i, num_classes in enumerate(CLASSES)
        for j, strides in enumerate(STRIDES)
        if num_classes < 2000 or j < 2
    ]
    seen = {tuple(case.values) for case in short}
    rest = [(dtype, s, c) for dtype in DTYPES for s in STRIDES for c in CLASSES if (dtype, s, c) not in seen]
    return short + [pytest.param(*case, marks=pytest.mark.full) for case in rest]


@pytest.mark.parametrize(("dtype", "strides", "num_classes"), grid())
def test_values_and_gradient(dtype, strides, num_classes, backend):
    logits, labels = sample(num_classes, dtype, strides)
    confidence, top, correct = top_label(logits, labels)
    assert (confidence.dtype, top.dtype, correct.dtype) == (torch.float32, torch.int64, torch.bool)
    # the first of equal ones
    assert torch.equal(top, logits.float().argmax(1)) and torch.equal(correct, top == labels)
    weight = torch.randn(2 * len(labels))[::2]
    expected, expected_grad = confidence_and_gradient(logits, top, weight)
    assert_near(confidence, expected, TOLERANCE)

    leaf = logits.detach().requires_grad_()
    found, *rest = top_label(leaf, labels)
    assert torch.equal(found, confidence) and not any(other.requires_grad for other in rest)
    (grad,) = torch.autograd.grad(found, leaf, weight)
    assert grad.dtype == dtype and grad.is_contiguous()
    assert_near(grad, expected_grad, TOLERANCE)


@pytest.mark.parametrize("num_classes", [5, 37, 300, 1500])
def test_masked_and_spoilt_rows(num_classes, backend):
    c, n = num_classes, 12
    logits, labels = torch.randn(n, c), torch.zeros(n, dtype=torch.int64)
    logits[0, : c // 2] = -math.inf
    logits[1, 1:] = -math.inf
    # each of them spoils its row
    logits[2, c - 1], logits[3, c // 2], logits[4, 0] = math.nan, math.inf, -math.nan
    logits[5], logits[6], logits[7, :2] = -math.inf, math.nan, torch.tensor([math.inf, -math.inf])
    # but not a difference beyond the range of floats
    logits[8, 0], logits[8, 1] = 3e38, -3e38
    logits[9] += 1e4
    spoilt = torch.zeros(n, dtype=torch.bool)
    spoilt[2:8] = True

    leaf = logits.clone().requires_grad_()
    confidence, top, correct = top_label(leaf, labels)
    assert torch.equal(confidence.isnan(), spoilt) and not correct[spoilt].any()
    assert ((top >= 0) & (top < c)).all()
    (grad,) = torch.autograd.grad(confidence.sum(), leaf)
    assert torch.equal(grad.isnan(), spoilt[:, None].expand(n, c))

    good = ~spoilt
    expected, expected_grad = confidence_and_gradient(logits[good], top[good], torch.ones(int(good.sum())))
    assert torch.equal(top[good], logits[good].argmax(1)) and torch.equal(correct[good], top[good] == 0)
    assert_near(confidence[good].detach(), expected, TOLERANCE)
    assert_near(grad[good], expected_grad, TOLERANCE)
    assert confidence[1] == 1 and (grad[1] == 0).all() and (grad[0, : c // 2] == 0).all()


@pytest.mark.parametrize("label", [-1, 10, 2**40, -(2**40)])
def test_a_label_out_of_range(label, backend):
    logits, labels = torch.randn(5, 10), torch.tensor([0, 9, label, 3, 4])
    if backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=rf"labels\[2\]={label} is out of range: labels must lie in 0..9"):
            top_label(logits, labels)
        return
    leaf = logits.requires_grad_()
    confidence, top, correct = top_label(leaf, labels)
    assert torch.equal(confidence.isnan(), torch.arange(5) == 2) and not correct[2]
    assert torch.equal(top, logits.argmax(1))
    (grad,) = torch.autograd.grad(confidence.sum(), leaf)
    assert torch.equal(grad.isnan().all(1), torch.arange(5) == 2) and not grad[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype, backend):
    leaf = torch.empty(0, 3, dtype=dtype, requires_grad=True)
    confidence, top, correct = top_label(leaf, torch.empty(0, dtype=torch.int64))
    assert confidence.shape == top.shape == correct.shape == (0,)
    assert torch.autograd.grad(confidence.sum(), leaf)[0].shape == (0, 3)


def test_gradcheck_in_float64(backend):
    """Which is the reference's, whatever backend is chosen."""
    logits, labels = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    logits.data[0, 1] = -math.inf
    leaf = logits.detach()[1:].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: top_label(f, labels[1:])[0], (leaf,))
    confidence, top, _ = top_label(logits, labels)
    assert confidence.dtype == torch.float64
    assert_near(confidence.detach(), logits.detach().softmax(1).max(1).values, 1e-15)


def test_transforms(backend):
    logits, labels = torch.randn(3, 4, 10), torch.randint(10, (3, 4))
    each = [top_label(f, y) for f, y in zip(logits, labels)]
    for mapped, expected in zip(torch.func.vmap(top_label)(logits, labels), zip(*each)):
        assert torch.equal(mapped, torch.stack(expected))

    def total(f: Tensor, y: Tensor) -> Tensor:
        return top_label(f, y)[0].sum()

    expected_grad = torch.stack(
        [_gradient(torch.ones(4), f, confidence, top) for f, (confidence, top, _) in zip(logits, each)]
    )
    assert torch.equal(torch.func.grad(total)(logits[0], labels[0]), expected_grad[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(total))(logits, labels), expected_grad)
    leaf = logits.clone().requires_grad_()
    torch.func.vmap(total)(leaf, labels).sum().backward()
    assert torch.equal(leaf.grad, expected_grad)
    # the classes' dimension mapped last, and labels shared by all
    moved = torch.func.vmap(torch.func.grad(total), in_dims=(2, None))(logits.permute(1, 2, 0), labels[0])
    assert torch.equal(moved[0], expected_grad[0])


def test_a_second_derivative_is_refused(backend):
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    (grad,) = torch.autograd.grad(top_label(logits, labels)[0].sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="top_label is differentiable once"):
        (grad.sum() + logits.sum()).backward()
    first = torch.func.grad(lambda f: top_label(f, labels)[0].sum())
    with pytest.raises(NotImplementedError, match="top_label is differentiable once"):
        torch.func.jacrev(first)(logits.detach())


def test_compiled_with_its_backward(backend):
    torch._dynamo.reset()
    logits, labels = torch.randn(5, 10), torch.randint(10, (5,))
    compiled = torch.compile(lambda f: top_label(f, labels), fullgraph=True, backend="aot_eager")
    leaves = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for found, expected in zip(compiled(leaves[0]), top_label(leaves[1], labels)):
        assert torch.equal(found, expected)
    grads = [torch.autograd.grad(function(leaf)[0].sum(), leaf) for function, leaf in
             ((compiled, leaves[0]), (lambda f: top_label(f, labels), leaves[1]))]  # fmt: skip
    assert torch.equal(*[grad for (grad,) in grads])


@pytest.mark.parametrize("classwise", [False, True])
def test_smooth_ece_of_logits_and_its_gradient(classwise, backend):
    logits, labels = torch.randn(60, 5, requires_grad=True), torch.randint(5, (60,))
    found = smooth_ece_from_logits(logits, labels, classwise=classwise).value
    with use_backend("reference"):
        wide = logits.detach().double().requires_grad_()
        expected = smooth_ece_from_logits(wide, labels, classwise=classwise).value
        expected_grad = torch.autograd.grad(expected, wide)[0]
    assert_near(found.detach(), expected.detach(), 1e-6)
    assert_near(torch.autograd.grad(found, logits)[0], expected_grad, 1e-5)


def test_calibration_has_the_ops_results(backend):
    logits, labels = torch.randn(20, 5), torch.randint(5, (20,), dtype=torch.int32)
    confidence, _, correct = top_label(logits, labels)
    found = predictions.top_label(logits, labels)
    assert torch.equal(found.confidence, confidence) and torch.equal(found.correct, correct)


FOUR = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]], torch.zeros(1).long()), TypeError, "logits must be a torch.Tensor, got list"),
        ((FOUR.long(), torch.zeros(3).long()), TypeError, "logits has dtype torch.int64"),
        ((FOUR[0], torch.zeros(3).long()), ValueError, r"logits has shape \(4,\)"),
        ((FOUR[:, :0], torch.zeros(3).long()), ValueError, r"logits has shape \(3, 0\).*at least one class"),
        ((FOUR, [0, 1, 2]), TypeError, "labels must be a torch.Tensor, got list"),
        ((FOUR, torch.zeros(3)), TypeError, "labels has dtype torch.float32; it must be an integer type"),
        ((FOUR, torch.zeros(2).long()), ValueError, r"labels has shape \(2,\); it must be \(3,\)"),
        ((FOUR, torch.zeros(3, device="meta").long()), ValueError, "labels is on meta but logits is on cpu"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        top_label(*arguments)


def test_reference_gives_labels_out_of_range_nan_where_they_are_not_looked_at(monkeypatch):
    """As on a GPU, which is not waited for."""
    monkeypatch.setattr(reference, "check_labels", lambda *arguments: pytest.fail("a meta tensor has no values"))
    found = reference.top_label(FOUR.to("meta"), torch.zeros(3, device="meta").long())
    assert [part.dtype for part in found] == [torch.float32, torch.int64, torch.bool]
