"""smooth_ece against its definition: quadrature of |R| with the Gaussian summed over its images, and bisection."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from emulation.backend import emulated_backend, serve_cpu_tensors
from formulas import assert_near
from measured import value_and_gradient
from numpy.typing import NDArray

from calguide_fast import smooth_ece, smooth_ece_from_logits, use_backend
from calguide_fast.backends import cpu, reference
from calguide_fast.backends import smooth_ece as plain

Sample = tuple[NDArray, NDArray, NDArray]  # confidences, outcomes, weights

FLOOR = 1e-3


@pytest.fixture(params=["cpu", "cuda", pytest.param("triton", marks=pytest.mark.full), "reference"])
def served(request, monkeypatch):
    """The backends: CUDA by emulation, Triton by interpretation, where each measurement takes a second or so."""
    if request.param == "cuda":
        serve_cpu_tensors(monkeypatch)
    if request.param == "triton":
        request.getfixturevalue("interpreted_triton")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpu", "reference"])
def served_quickly(request):
    """Those with which hundreds of measurements take no minutes."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpu", "reference"])
def checked(request):
    """The backends that look at the values of a CPU's tensors."""
    with use_backend(request.param):
        yield request.param


def curve(t: NDArray, sigma: float, f: NDArray, y: NDArray, w: NDArray) -> NDArray:
    """R at the points t: Gaussians at every reflection of f in 0 and 1."""
    reach = math.ceil(4.5 * sigma) + 1
    r = np.zeros_like(t)
    for image in range(-reach, reach + 1):
        for sign in (1, -1):
            distance = (t[:, None] - 2 * image - sign * f) / sigma
            r += np.exp(-0.5 * distance**2) @ (w * (f - y)) / (sigma * math.sqrt(2 * math.pi))
    return r / w.sum()


def integral(sigma: float, f: NDArray, y: NDArray, w: NDArray) -> float:
    """The integral of |R|, exact for its linear interpolation on a fine grid."""
    t = np.linspace(0, 1, max(2001, math.ceil(500 / sigma)))
    r = curve(t, sigma, f, y, w)
    a, b = r[:-1], r[1:]
    size = (np.abs(a) + np.abs(b)) / 2
    crossing = a * b < 0
    size[crossing] = (a**2 + b**2)[crossing] / (2 * (np.abs(a) + np.abs(b))[crossing])
    return float(size.sum() * (t[1] - t[0]))


def bisected(f: NDArray, y: NDArray, w: NDArray) -> float:
    low, high = 0.0, 1.0
    for _ in range(28):
        middle = (low + high) / 2
        if integral(middle, f, y, w) > middle:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def outcomes(generator: np.random.Generator, chance: NDArray) -> NDArray:
    return (generator.random(len(chance)) < chance).astype(float)


def smooth(g: np.random.Generator) -> Sample:
    f = g.random(60)
    return f, outcomes(g, f**1.5), np.ones(60)


def calibrated(g: np.random.Generator) -> Sample:
    f = g.random(60)
    return f, outcomes(g, f), np.ones(60)


def weighted(g: np.random.Generator) -> Sample:
    f = g.random(50)
    return f, outcomes(g, f**0.7), g.random(50)


def one_signed(g: np.random.Generator) -> Sample:
    return g.random(30), np.zeros(30), np.ones(30)


def one(g: np.random.Generator) -> Sample:
    return np.array([0.7]), np.array([1.0]), np.ones(1)


def two(g: np.random.Generator) -> Sample:
    return np.array([0.35, 0.6]), np.array([0.0, 1.0]), np.ones(2)


def mass(place: float, chance: float, half: bool):
    """400 samples with all or half of them at one place, which are taken together in the weights."""

    def sample(g: np.random.Generator) -> Sample:
        here = 200 if half else 400
        right = round(chance * here)
        f = g.random(400 - here)
        y = outcomes(g, 0.8 * f + 0.1)
        weights = np.concatenate([np.ones(len(f)), [right, here - right]])
        return np.append(f, [place, place]), np.append(y, [1.0, 0.0]), weights

    return sample


CASES = {
    "smooth": smooth,
    "calibrated": calibrated,
    "weighted": weighted,
    "one signed": one_signed,
    "one": one,
    "two": two,
    "all at 0": mass(0.0, 0.2, half=False),
    "all at 1": mass(1.0, 0.7, half=False),
    "half at 0": mass(0.0, 0.3, half=True),
    "half at 1": mass(1.0, 0.65, half=True),
}


@functools.cache
def case(name: str) -> Sample:
    return CASES[name](np.random.default_rng(3))


@functools.cache
def expected(name: str) -> float:
    return bisected(*case(name))


def tensors(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f, y, w = case(name)
    return torch.tensor(f), torch.tensor(y), torch.tensor(w)


def sample(n: int, power: float = 1.5, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    f = torch.rand(n, dtype=torch.float64)
    return f.to(dtype), torch.rand(n, dtype=torch.float64) < f**power


@pytest.mark.parametrize("name", CASES)
def test_fixpoint_is_that_of_the_definition(name, served):
    f, y, w = tensors(name)
    found = smooth_ece(f, y, weights=w)
    assert found.value.dtype == found.bandwidth.dtype == torch.float64 and found.value.shape == ()
    assert found.value.item() == pytest.approx(expected(name), abs=1e-7)
    assert found.bandwidth.item() == pytest.approx(found.value.item(), abs=1e-11)


@pytest.mark.parametrize("sigma", [0.02, 0.07, 0.4, 2.0])
@pytest.mark.parametrize("name", ["smooth", "two", "half at 1"])
def test_fixed_bandwidth_is_the_integral(name, sigma, served):
    f, y, w = tensors(name)
    found = smooth_ece(f, y, sigma, w)
    assert found.value.item() == pytest.approx(integral(sigma, *case(name)), abs=1e-7)
    assert found.bandwidth.item() == sigma


@pytest.mark.parametrize("sigma", [0.004, 0.05, 0.5])
def test_binned_moments_serve_any_bandwidth(sigma):
    """More samples than are taken one by one, with no bandwidth to round off."""
    f, y = sample(6000)
    with use_backend("reference"):
        expected = smooth_ece(f, y, sigma).value
    assert_near(smooth_ece(f, y, sigma).value, expected, 1e-9)


@pytest.mark.parametrize("n", [3, 100, 4096, 4097, 20000])
@pytest.mark.parametrize("power", [1.0, 1.5])
def test_kernels_equal_reference(n, power):
    f, y = sample(n, power)
    expected_stats, expected_grad = value_and_gradient(reference, f, y, None, 0.0)
    for backend in (cpu, emulated_backend()):
        stats, grad = value_and_gradient(backend, f, y, None, 0.0)
        assert_near(stats, expected_stats, 2e-9)
        assert_near(grad / expected_grad.abs().max(), expected_grad / expected_grad.abs().max(), 5e-6)


def test_a_double_root_between_two_looks_is_found():
    """As the weight grows, R dips through 0 between two points of the grid, and at first shows it at neither."""
    f = torch.tensor([0.2062, 0.4562, 0.7062], dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, 0.0])
    for weight in torch.linspace(0.0614, 0.0624, 100, dtype=torch.float64):
        w = torch.tensor([1.0, weight, 1.0], dtype=torch.float64)
        expected = reference.smooth_ece(f, y > 0, w, 0.1, False)[0]
        for backend in (cpu, emulated_backend()):
            assert_near(backend.smooth_ece(f, y > 0, w, 0.1, False)[0], expected, 1e-9)


def test_gradient_where_the_residual_grazes_zero(served):
    """R is beyond 0 for 0.004 bandwidths only. The gradient is that of the definition: 0.1 % away from one without the
    dip, as it changes with the root of the dip's depth.
    """
    f, y, w, sigma = np.array([0.2062, 0.4562, 0.7062]), np.array([0.0, 1, 0]), np.array([1, 0.06166421404682, 1]), 0.1
    near = np.linspace(0.4312, 0.432, 8001)
    r = curve(near, sigma, f, y, w)
    (i, j) = np.nonzero(r[1:] * r[:-1] < 0)[0]
    roots = [near[k] + (near[1] - near[0]) * r[k] / (r[k] - r[k + 1]) for k in (i, j)]

    def smoothed_sign(x: float) -> float:
        def up_to(t: float) -> float:
            images = [t - 2 * image - side * x for image in range(-2, 3) for side in (1, -1)]
            return sum(math.erf(d / (sigma * math.sqrt(2))) for d in images) / 2

        return up_to(1) - up_to(0) - 2 * (up_to(roots[1]) - up_to(roots[0]))

    slope = [(smoothed_sign(x + 1e-5) - smoothed_sign(x - 1e-5)) / 2e-5 for x in f]
    expected = w / w.sum() * ([smoothed_sign(x) for x in f] + (f - y) * slope)
    leaf = torch.tensor(f, requires_grad=True)
    value = smooth_ece(leaf, torch.tensor(y), sigma, torch.tensor(w)).value
    assert_near(torch.autograd.grad(value, leaf)[0], torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_confidences(dtype, served):
    f, y = sample(500, dtype=dtype)
    found, wide = smooth_ece(f, y), smooth_ece(f.double(), y)
    assert found.value.dtype == torch.float32
    assert_near(found.value, wide.value, 1e-7)
    leaf, wide_leaf = f.clone().requires_grad_(), f.double().requires_grad_()
    (grad,) = torch.autograd.grad(1000 * smooth_ece(leaf, y).value, leaf)
    (wide_grad,) = torch.autograd.grad(1000 * smooth_ece(wide_leaf, y).value, wide_leaf)
    assert grad.dtype == dtype
    # in units of the largest
    size = wide_grad.abs().max()
    assert_near(grad.double() / size, wide_grad / size, max(5e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [1.3, 0.001])
@pytest.mark.parametrize("n", [4097, 4160, 6000])
def test_binned_samples_keep_their_places(n, power, dtype):
    """Whole blocks and what is left of them; spread out, and all near 1 as a confident classifier has them."""
    f = (torch.rand(n, dtype=torch.float64) ** power).to(dtype)
    y, w = torch.rand(n) < f**1.3, torch.rand(n, dtype=torch.float64).to(dtype)
    for weights in (None, w):
        with use_backend("cpu"):
            found = smooth_ece(f, y, weights=weights)
        with use_backend("reference"):
            wide = smooth_ece(f.double(), y, weights=None if weights is None else weights.double())
        assert_near(found.value, wide.value, 1e-8)


def test_a_small_fixpoint_of_many_samples():
    """As one class of many has it: the search asks for more bins on its way, and the series are long."""
    f = torch.rand(50_000, dtype=torch.float64) ** 40
    y = torch.rand(50_000) < 0.9 * f
    stats, grad = value_and_gradient(cpu, f, y, None, 0.0)
    expected_stats, expected_grad = value_and_gradient(reference, f, y, None, 0.0)
    assert 0.001 < expected_stats[0] < 0.0058
    assert_near(stats, expected_stats, 1e-9)
    size = expected_grad.abs().max()
    assert_near(grad / size, expected_grad / size, 5e-5)


@pytest.mark.parametrize("bandwidth", [None, 0.05])
@pytest.mark.parametrize("name", ["smooth", "calibrated", "weighted", "one signed", "two", "half at 1"])
def test_gradient_is_that_of_finite_differences(name, bandwidth, served_quickly):
    f, y, w = tensors(name)
    f = f.clamp(1e-4, 1 - 1e-4)
    leaf = f.clone().requires_grad_()
    (grad,) = torch.autograd.grad(smooth_ece(leaf, y, bandwidth, w).value, leaf)
    step = 1e-5
    for i in range(0, len(f), max(1, len(f) // 12)):
        shift = step * torch.nn.functional.one_hot(torch.tensor(i), len(f)).double()
        up, down = (smooth_ece(f + sign * shift, y, bandwidth, w).value for sign in (1, -1))
        assert grad[i].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-5 * grad.abs().max().item())


@pytest.mark.parametrize("bandwidth", [None, 0.1])
def test_gradcheck(bandwidth, served_quickly):
    f, y = sample(12)
    assert torch.autograd.gradcheck(lambda f: smooth_ece(f, y, bandwidth).value, (f.requires_grad_(),))


def test_gradient_scales_and_bandwidth_is_detached(served):
    f, y = sample(50)
    leaf = f.clone().requires_grad_()
    found = smooth_ece(leaf, y)
    assert found.value.requires_grad and not found.bandwidth.requires_grad
    (grad,) = torch.autograd.grad(found.value, leaf)
    (scaled,) = torch.autograd.grad(-4 * smooth_ece(leaf, y).value, leaf)
    assert torch.equal(scaled, -4 * grad)
    with torch.no_grad():
        assert not smooth_ece(leaf, y).value.requires_grad


def test_a_second_derivative_is_refused(served_quickly):
    f, y = sample(50)
    leaf = f.clone().requires_grad_()
    (grad,) = torch.autograd.grad(smooth_ece(leaf, y).value, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        (grad.sum() + leaf.sum()).backward()
    first = torch.func.grad(lambda f: smooth_ece(f, y).value)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.func.grad(lambda f: first(f).sum())(f)


def test_value_may_be_added_to_and_samples_may_not_change(served_quickly):
    f, y = sample(50)
    leaf = f.clone().requires_grad_()
    value = smooth_ece(leaf, y).value
    (grad,) = torch.autograd.grad(value, leaf)
    loss = smooth_ece(leaf, y).value
    loss += 1.0
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], grad)
    loss = smooth_ece(leaf, y).value
    y.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("n", "dtype"), [(5000, torch.float64), (5001, torch.float16), (2_200_000, torch.float32)])
def test_gradient_of_a_few_is_that_among_all(n, dtype):
    """A few samples have the curve at their own places, many its cubics, in memory of huge pages where it is large."""
    f, y = sample(n, 1.0, dtype)
    _, _, curve = cpu.smooth_ece(f.double(), y, None, 0.03, True)
    value_grad = torch.full((), float(n), dtype=torch.promote_types(dtype, torch.float32))
    grad = cpu.smooth_ece_gradient(f, y, None, curve, value_grad)
    few = cpu.smooth_ece_gradient(f[-200:], y[-200:], None, curve, value_grad)
    size = few.abs().max().double()
    assert_near(grad[-200:] / size, few / size, max(5e-6, torch.finfo(dtype).eps))


def test_func_transforms(served_quickly):
    f, y = sample(60)
    f, y = f.view(3, 20), y.view(3, 20)

    def value(f, y):
        return smooth_ece(f, y).value

    each = torch.stack([value(*row) for row in zip(f, y)])
    assert torch.equal(torch.func.vmap(value)(f, y), each)
    leaf = f[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf, y[0]), leaf)
    assert torch.equal(torch.func.grad(value)(f[0], y[0]), grad)
    mapped = torch.func.vmap(torch.func.grad(value))(f, y)
    assert torch.equal(mapped[0], grad)
    assert torch.equal(torch.func.grad(lambda f: torch.func.vmap(value)(f, y).sum())(f), mapped)
    # autograd's own gradient, of what is mapped inside
    leaf = f.clone().requires_grad_()
    torch.func.vmap(value)(leaf, y).sum().backward()
    assert torch.equal(leaf.grad, mapped)


def test_compiled_backward(served):
    torch._dynamo.reset()
    f, y = sample(30, dtype=torch.float32)
    leaf, again = f.clone().requires_grad_(), f.clone().requires_grad_()
    compiled = torch.compile(lambda f: smooth_ece(f, y).value * 2, fullgraph=True, backend="aot_eager")
    compiled(leaf).backward()
    (smooth_ece(again, y).value * 2).backward()
    assert torch.equal(leaf.grad, again.grad)


@pytest.mark.parametrize("outcome", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_outcomes_of_any_dtype(outcome, served):
    f, y = sample(40)
    assert torch.equal(smooth_ece(f, y.to(outcome)).value, smooth_ece(f, y).value)


@pytest.mark.parametrize("n", [40, 5000])
def test_a_byte_that_is_no_bool_is_true(n, served):
    """As PyTorch reads it; taken as a number, it would be an index far out of bounds."""
    f = sample(n, dtype=torch.float32)[0].requires_grad_()
    malformed = torch.full((n,), 255, dtype=torch.uint8).view(torch.bool)
    values = [smooth_ece(f, y).value for y in (malformed, torch.ones(n, dtype=torch.bool))]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value, f)[0] for value in values))


def test_strided_inputs(served):
    f, y = sample(40)
    w = torch.rand(40, dtype=torch.float64)
    dense = [tensor[::2].contiguous() for tensor in (f, y, w)]
    assert_near(
        smooth_ece(f[::2], y[::2], None, w[::2]).value, smooth_ece(dense[0], dense[1], None, dense[2]).value, 1e-14
    )


@pytest.mark.parametrize("n", [200, 5000])
def test_weights_are_repetitions(n, served):
    f, y = sample(n)
    times = torch.randint(0, 4, (n,))
    repeated = smooth_ece(f.repeat_interleave(times), y.repeat_interleave(times))
    assert_near(smooth_ece(f, y, weights=times.double()).value, repeated.value, 2e-9)
    assert_near(smooth_ece(f, y, weights=7 * times.double()).value, repeated.value, 2e-9)


@pytest.mark.parametrize("n", [200, 5000])
def test_order_and_naming_of_the_outcomes_do_not_matter(n, served):
    f, y = sample(n)
    value = smooth_ece(f, y).value
    order = torch.randperm(n)
    assert_near(smooth_ece(f[order], y[order]).value, value, 1e-12)
    assert_near(smooth_ece(1 - f, ~y).value, value, 2e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_value_is_between_its_bounds(power, served):
    f, y = sample(300, power)
    r = f - y.double()
    value = smooth_ece(f, y).value
    assert r.mean().abs() - 1e-12 <= value <= r.abs().mean()
    # the integral falls with the bandwidth
    values = torch.stack([smooth_ece(f, y, sigma).value for sigma in (0.01, 0.05, 0.2, 0.8, 3.0)])
    assert (values.diff() < 1e-12).all()
    assert_near(values[-1], r.mean().abs(), 1e-9)


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_a_mass_at_the_end_counts_in_full(place, served):
    f = torch.full((1000,), place)
    y = torch.arange(1000) < 820
    assert smooth_ece(f, y).value.item() == pytest.approx(0.82 if place == 0 else 0.18, abs=1e-7)


def test_residuals_of_zero(served):
    f = torch.tensor([0.0, 1.0, 1.0, 0.0])
    leaf = f.clone().requires_grad_()
    found = smooth_ece(leaf, f)
    assert found.value == 0 and found.bandwidth.item() == pytest.approx(FLOOR)
    assert torch.equal(torch.autograd.grad(found.value, leaf)[0], torch.zeros(4))
    # residuals that cancel where they are
    assert smooth_ece(torch.tensor([0.5, 0.5]), torch.tensor([0, 1])).value == 0


def test_bandwidth_has_a_floor(served):
    leaf = torch.full((50,), 2e-4, dtype=torch.float64, requires_grad=True)
    found = smooth_ece(leaf, torch.zeros(50))
    assert found.bandwidth == FLOOR
    assert found.value.item() == pytest.approx(2e-4, abs=1e-12)
    assert_near(torch.autograd.grad(found.value, leaf)[0], torch.full((50,), 0.02, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("n", [140_000, 600_001])
def test_result_does_not_depend_on_threads(n, two_threads):
    f, y = sample(n, 1.1, torch.float32)
    w = torch.rand(len(f))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(cpu, f, y, w, 0.0))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_gradient_descent_calibrates(served_quickly):
    """Confidences 0.3 too high are brought to the frequency by temperature alone."""
    margin = 2 * torch.rand(2000) + 0.5
    y = torch.rand(2000) < torch.sigmoid(margin)
    log_scale = torch.tensor(1.5, requires_grad=True)
    before = smooth_ece(torch.sigmoid(margin * log_scale.exp()), y).value.item()
    optimizer = torch.optim.Adam([log_scale], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        smooth_ece(torch.sigmoid(margin * log_scale.exp()), y).value.backward()
        optimizer.step()
    assert before > 0.1
    assert smooth_ece(torch.sigmoid(margin * log_scale.exp()), y).value < 0.03


def test_from_logits_is_of_the_top_class(served):
    logits, labels = 3 * torch.randn(200, 10), torch.randint(10, (200,))
    p = logits.softmax(1)
    confidence, correct = p.max(1).values, p.argmax(1) == labels
    found = smooth_ece_from_logits(logits, labels)
    assert_near(found.value, smooth_ece(confidence, correct).value.double(), 1e-7)
    weights = torch.rand(200)
    weighed = smooth_ece_from_logits(logits, labels, 0.1, weights)
    assert_near(weighed.value, smooth_ece(confidence, correct, 0.1, weights).value.double(), 1e-7)
    assert weighed.bandwidth.item() == pytest.approx(0.1)


def test_from_logits_classwise_is_the_mean(served):
    logits, labels = torch.randn(100, 4), torch.randint(4, (100,))
    each = torch.stack([smooth_ece(logits.softmax(1)[:, c], labels == c).value for c in range(4)])
    assert torch.equal(smooth_ece_from_logits(logits, labels, classwise=True).value, each.mean())


@pytest.mark.parametrize("classwise", [False, True])
def test_from_logits_gradcheck(classwise, served_quickly):
    logits, labels = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), torch.randint(3, (8,))
    assert torch.autograd.gradcheck(
        lambda logits: smooth_ece_from_logits(logits, labels, classwise=classwise).value, (logits,)
    )


HALF, RIGHT = torch.full((3,), 0.5), torch.tensor([0, 1, 1])
# weights of sums that nothing can be divided by
EXTREME = {
    "zero": torch.zeros(3, dtype=torch.float64),
    "subnormal": torch.full((3,), 1e-310, dtype=torch.float64),
    "infinite": torch.full((3,), 1e308, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], RIGHT), TypeError, "confidence must be a torch.Tensor, got list"),
        ((torch.ones(3, dtype=torch.int64), RIGHT), TypeError, "confidence has dtype torch.int64"),
        ((torch.zeros(2, 2), RIGHT), ValueError, r"confidence has shape \(2, 2\); it must be \(n,\)"),
        ((torch.empty(0), torch.empty(0)), ValueError, r"confidence has shape \(0,\).*at least 1"),
        ((HALF, [0, 1, 1]), TypeError, "correct must be a torch.Tensor, got list"),
        ((HALF, RIGHT[:2]), ValueError, r"correct has shape \(2,\); it must be \(3,\)"),
        ((HALF, RIGHT.to(torch.complex64)), TypeError, "correct has dtype torch.complex64"),
        ((HALF, torch.tensor([0, 2, 1])), ValueError, r"correct\[1\]=2 must be 0 or 1"),
        ((HALF, torch.tensor([0.0, 1.0, math.nan])), ValueError, r"correct\[2\]=nan must be 0 or 1"),
        ((torch.tensor([0.1, 1.5, 0.2]), RIGHT), ValueError, r"confidence\[1\]=1.5 must lie in \[0, 1\]"),
        ((torch.tensor([0.1, -0.5, 0.2]), RIGHT > 0), ValueError, r"confidence\[1\]=-0.5 must lie in \[0, 1\]"),
        ((torch.tensor([0.1, math.nan, 0.2]), RIGHT > 0), ValueError, r"confidence\[1\]=nan must lie in \[0, 1\]"),
        ((HALF, RIGHT, 0.0), ValueError, "bandwidth=0.0 must be finite and at least 0.001"),
        ((HALF, RIGHT, math.nan), ValueError, "bandwidth=nan must be finite"),
        ((HALF, RIGHT, "0.1"), TypeError, "bandwidth must be a number, got '0.1'"),
        ((HALF, RIGHT, None, [1, 1, 1]), TypeError, "weights must be a torch.Tensor, got list"),
        ((HALF, RIGHT, None, torch.ones(2)), ValueError, r"weights has shape \(2,\); it must be \(3,\)"),
        ((HALF, RIGHT > 0, None, torch.tensor([1.0, -1, 1])), ValueError, r"weights\[1\]=-1.0 must be finite and at"),
        ((HALF, RIGHT > 0, None, torch.tensor([1.0, 1, math.inf])), ValueError, r"weights\[2\]=inf must be finite"),
        ((HALF, RIGHT > 0, None, torch.zeros(3)), ValueError, r"weights are all 0 \(3 of them\)"),
        (
            (HALF.double(), RIGHT > 0, None, EXTREME["subnormal"]),
            ValueError,
            r"weights sum to 3e-310; the sum must lie",
        ),
        ((HALF.double(), RIGHT > 0, None, EXTREME["infinite"]), ValueError, r"weights sum to inf; the sum must lie in"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message, checked):
    with pytest.raises(error, match=message):
        smooth_ece(*arguments)


@pytest.mark.parametrize("index", [0, 127, 4999])
def test_a_wrong_value_among_many_is_found(index, checked):
    f, y = sample(5000)
    f[index] = math.nan
    with pytest.raises(ValueError, match=rf"confidence\[{index}\]=nan"):
        smooth_ece(f, y)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), RIGHT), ValueError, r"logits has shape \(3,\); it must be \(n, C\)"),
        ((torch.zeros(0, 4), RIGHT), ValueError, r"logits has shape \(0, 4\)"),
        ((torch.zeros(3, 4), RIGHT[:2]), ValueError, r"labels has shape \(2,\)"),
        ((torch.zeros(3, 4), HALF), TypeError, "labels has dtype torch.float32; it must be an integer type"),
        ((torch.zeros(3, 4), RIGHT + 3), ValueError, r"labels\[1\]=4 is out of range"),
    ],
)
def test_wrong_logits_and_labels_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        smooth_ece_from_logits(*arguments)


SPOILT = {
    "not a number": (0, math.nan),
    "above 1": (0, 1.5),
    "below 0": (0, -1e-9),
    "a negative weight": (1, -1.0),
    "a weight that is no number": (1, math.nan),
    "an infinite weight": (1, math.inf),
}


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize("bandwidth", [0.0, 0.1])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_where_values_are_not_looked_at_they_give_nan(spoilt, bandwidth, backend, monkeypatch):
    """As on a GPU, whose tensors are not waited for."""
    monkeypatch.setattr(plain, "check_outcomes", lambda *arguments: None)
    kernels = emulated_backend() if backend == "cuda" else reference
    samples = HALF.clone(), torch.ones(3)
    which, value = SPOILT[spoilt]
    samples[which][1] = value
    stats, grad = value_and_gradient(kernels, samples[0], RIGHT > 0, samples[1], bandwidth)
    assert stats.isnan().all() and grad.shape == (3,) and grad.isnan().all()


@pytest.mark.parametrize("weights", EXTREME)
def test_weights_of_no_sum_give_nan_where_they_are_not_looked_at(weights, monkeypatch):
    monkeypatch.setattr(plain, "check_outcomes", lambda *arguments: None)
    for kernels in (emulated_backend(), reference):
        stats, grad = value_and_gradient(kernels, HALF.double(), RIGHT > 0, EXTREME[weights], 0.0)
        assert stats.isnan().all() and grad.isnan().all()


@pytest.mark.parametrize("size", [1e-268, 1e268])
def test_the_size_of_the_weights_does_not_matter(size, served):
    f, y, w = tensors("weighted")
    assert smooth_ece(f, y, weights=size * w).value.item() == pytest.approx(expected("weighted"), abs=1e-7)
