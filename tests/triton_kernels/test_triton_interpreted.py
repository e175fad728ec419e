"""What the parity tests of all backends do not reach of Triton's: a GPU's rounding, its tiles, offsets, waits."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from conftest import HAS_TRITON
from formulas import NAMES, assert_near, literal
from measured import value_and_gradient
from torch.utils._python_dispatch import TorchDispatchMode

from calguide_fast import FDivSampler, Guidance, guidance_gradient, guided_step, tilt_weights, use_backend
from calguide_fast.backends import reference
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.top_label import top_label
from calguide_fast.schedule import Schedule

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it is a part of the dev extra on Linux)"),
    pytest.mark.usefixtures("interpreted_triton"),
]

ROW = Schedule.linear().respaced("25").coefficients()[12]


@pytest.fixture
def backend(interpreted_triton):
    from calguide_fast.backends import triton

    with use_backend("triton"):
        yield triton


@pytest.fixture
def launch(backend, monkeypatch):
    """Tiles as a GPU has them."""
    from calguide_fast.backends.triton import launch

    monkeypatch.setattr(launch, "LEAST_ROWS", 1)
    return launch


@pytest.fixture(params=[1, -1], ids=["high", "low"])
def approximate(backend, monkeypatch, request):
    """The bounds that PTX states for its approximations in fp32, all reached at once and in one direction."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    def in_float32(exact, approximation):
        def apply(builder, argument):
            return builder.unary_op(argument, approximation if argument.data.dtype == np.float32 else exact)

        return apply

    def exp(x):
        # ex2.approx of a rounded product
        return np.exp2((x * np.float32(math.log2(math.e))).astype(np.float64)) * (1 + request.param * 2.0**-22)

    def log(x):
        exact = np.log2(x.astype(np.float64))
        error = np.where((x > 0.5) & (x < 2), 2.0**-22.6, np.abs(exact) * 2.0**-22)
        return (exact + request.param * error) * math.log(2)

    def sqrt(x):
        return np.sqrt(x.astype(np.float64)) * (1 + request.param * 2.0**-23)

    for name, exact, approximation in (("exp", np.exp, exp), ("log", np.log, log), ("sqrt", np.sqrt, sqrt)):
        rounded = lambda x, f=approximation: f(x).astype(np.float32)  # noqa: E731
        monkeypatch.setattr(Builder, f"create_{name}", in_float32(exact, rounded))


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("gap", [0.0, 9.0, 30.0, 300.0])
def test_tolerance_holds_with_a_gpus_approximations(divergence, gap, approximate):
    logits, labels = torch.randn(16, 1000) * 2, torch.randint(1000, (16,))
    # the label ahead, or a wrong class; 9 nats leave about half of the probability to the others
    logits[range(8), labels[:8]] += gap
    logits[8:, 0] += gap
    settings = {"divergence": divergence, "entropy_weight": 0.7, "marginal_temperature": 0.5 if gap else 1.0}
    for got, expected in zip(guidance_gradient(logits, labels, **settings), literal(logits, labels, **settings)):
        assert_near(got, expected, 5e-6)


@pytest.mark.parametrize("num_classes", [10, 5000])
def test_top_label_holds_with_a_gpus_approximations(num_classes, approximate, launch):
    logits = torch.randn(5, num_classes, requires_grad=True)
    # the largest logit in the first tile and in the last
    logits.data[0, 0] = logits.data[1, -1] = 9.0
    confidence, top, _ = top_label(logits, torch.zeros(5, dtype=torch.int64))
    leaf = logits.detach().double().requires_grad_()
    expected, place = leaf.softmax(1).max(1)
    assert torch.equal(top, place)
    assert_near(confidence.detach(), expected.detach(), 2e-6)
    grads = torch.autograd.grad(confidence.sum(), logits)[0], torch.autograd.grad(expected.sum(), leaf)[0]
    assert_near(*grads, 2e-6)


def test_step_holds_with_a_gpus_approximations(approximate):
    x_t, output, gradient = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 16, 16).clamp(-1, 1), torch.randn(2, 3, 16, 16)
    arguments = (x_t, output, ROW, gradient)
    options = {"seeds": torch.tensor([3, -4]), "scores": torch.tensor([-1.0, -5.0]), "tilt": 0.5, "sine_boost": 0.3}
    found = guided_step(*arguments, **options, variance_max=torch.zeros(2))
    with use_backend("reference"):
        assert_near(found, guided_step(*arguments, **options, variance_max=torch.zeros(2)).double(), 5e-6)


@pytest.mark.parametrize("num_classes", [3, 100, 2048, 2049, 5000])
def test_tiles_as_they_are_launched(num_classes, launch):
    logits, labels = torch.randn(5, num_classes) * 3, torch.randint(num_classes, (5,))
    # the largest logit in the first tile and in the last, so that running sums are and are not rescaled
    logits[0, 0] = logits[1, -1] = 25.0
    logits[2, : num_classes // 2] = -math.inf
    logits[2, labels[2]] = 1.0
    for name in ("jeffreys", "js", "alpha:-1"):
        found = guidance_gradient(logits, labels, name, entropy_weight=0.5, adaptive_entropy=True)
        with use_backend("reference"):
            expected = guidance_gradient(logits, labels, name, entropy_weight=0.5, adaptive_entropy=True)
        for got, wanted in zip(found, expected):
            assert_near(got, wanted.double(), 5e-6)


def test_many_programs_of_an_image_share_its_maximum(launch):
    x_t, output = torch.randn(3, 3, 25, 31), torch.randn(3, 6, 25, 31)
    results = []
    for name in ("triton", "reference"):
        running = torch.tensor([0.0, 1e-3, 9.0])
        with use_backend(name):
            x_prev = guided_step(
                x_t, output, ROW, x_t, seeds=torch.arange(3), variance_max=running, sine_boost=0.5, out=x_t.clone()
            )
        results.append((x_prev, running))
    for got, expected in zip(*results):
        assert_near(got, expected.double(), 2e-6)


def test_offsets_have_64_bits(backend):
    # four gigabytes that are never touched but at a few places
    memory = torch.from_numpy(np.zeros(2**31 + 2**20, dtype=np.float16))
    stride = 2**30
    for shape, strides in (((3, 8), (stride, 1)), ((2, 5), (1, 2**29))):
        logits = memory.as_strided(shape, strides)
        logits.copy_(torch.randn(shape))
        labels = torch.tensor([4, 0, 2])[: shape[0]]
        expected = reference.guidance_gradient(logits, labels, 3, 0.0, 1.0, 0.9, 1.0, 0.5, 0.0, False, None)
        assert_near(guidance_gradient(logits, labels).grad, expected[0].double(), 5e-6)
        confidence, top, _ = reference.top_label(logits, labels)
        assert torch.equal(top_label(logits, labels)[1], top)
        found, wanted = (b.top_label_backward(confidence, logits, confidence, top) for b in (backend, reference))
        assert_near(found, wanted.double(), 5e-6)
    x_t, output = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    pixel_stride = 2**31 // 15 + 1
    for strides in ((stride, 16, 4, 1), (48, stride, 4, 1), (3, 1, 4 * pixel_stride, pixel_stride)):
        gradient = memory.as_strided((3, 3, 4, 4), strides)
        gradient.copy_(torch.randn(3, 3, 4, 4))
        found = guided_step(x_t, output, ROW, gradient, noise=x_t)
        assert torch.equal(found, guided_step(x_t, output, ROW, gradient.clone(), noise=x_t))


class NoWaiting(TorchDispatchMode):
    """Refuses what on a GPU waits for it: values that come to the host, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function._schema.name.removeprefix("aten::") not in self.WAITS, f"{function} waits for the device"
        return function(*arguments, **(keywords or {}))


def test_nothing_waits_for_the_device(backend):
    logits, labels = torch.randn(3, 10), torch.tensor([1, 99, 2])
    x_t, output, vector = torch.randn(3, 3, 5, 4), torch.randn(3, 6, 5, 4), torch.rand(6)[::2]
    with NoWaiting():
        backend.guidance_gradient(logits, labels, 3, 0.0, 1.0, 0.9, 1.0, 0.5, 0.3, True, None)
        confidence, top, _ = backend.top_label(logits, labels)
        backend.top_label_backward(vector, logits, confidence, top)
        backend.tilt_weights(vector, 0.3, False, 2.0)
        backend.predict_x0(x_t, output, ROW, True, torch.empty(3, 5, 4, 3).permute(0, 3, 1, 2))
        backend.guided_step(
            x_t, output, ROW, x_t, vector, vector, None, labels, vector, 0, True, 1.0, 0.3, 2.0, False, 0.3, True, x_t
        )
        backend.philox_normal(labels, (3, 5), 7, 1)
        value_and_gradient(backend, vector[::2], vector[::2] > 0.5, vector[::2], 0.1)


def test_draws_and_streams_beyond_31_bits(backend):
    seeds = torch.tensor([-(2**63), -1, 2**40])
    for draw, stream in ((2**32 - 1, 0), (2**31, 2**32 - 2), (5, 2**31 - 1)):
        assert torch.equal(
            sampling_noise(seeds, (3, 7), draw, stream), reference.philox_normal(seeds, (3, 7), draw, stream)
        )


def test_a_large_group_is_tilted_in_one_order(launch):
    scores = torch.randn(1000) * 3
    assert_near(tilt_weights(scores, 0.7), 1000 * (0.7 * scores.double()).softmax(0), 5e-6)


def test_a_sample(backend):
    model = torch.nn.Conv2d(3, 6, 3, padding=1)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    guidance = Guidance(divergence="jeffreys", tilt=-0.2, sine_boost=0.3, scale=2.0)
    images = []
    for name in ("triton", "reference"):
        sampler = FDivSampler(
            lambda x, t: model(x), classifier, guidance, classifier_input="x0", shape=(3, 4, 4), num_classes=5
        )
        with use_backend(name):
            images.append(sampler.sample(torch.arange(3), seeds=range(3), steps=3, progress=False).images)
    assert torch.allclose(*images, rtol=1e-4, atol=1e-4)


F32, F64 = torch.float32, torch.float64


def predictions(n, power, dtype=F64):
    f = torch.rand(n, dtype=F64)
    return f.to(dtype), torch.rand(n, dtype=F64) < f**power


def assert_near_reference(found, arguments, tolerance=2e-9):
    """Value and bandwidth, and the gradient relative to its largest size."""
    (stats, grad), (expected, expected_grad) = found, value_and_gradient(reference, *arguments)
    assert stats.dtype == grad.dtype == arguments[0].dtype
    assert_near(stats, expected.double(), tolerance)
    size = expected_grad.abs().max()
    assert_near(grad / size, (expected_grad / size).double(), 5e-6)


@pytest.mark.parametrize(
    ("n", "power", "bandwidth", "dtype", "weighted"),
    [(200, 1.5, 0.0, F64, False), (300, 1.0, 0.0, F32, True), (5000, 1.2, 0.05, F64, True), (1, 0.5, 3.0, F32, False)],
)
def test_smooth_ece_is_the_references(n, power, bandwidth, dtype, weighted, backend):
    f, y = predictions(n, power, dtype)
    arguments = (f, y, torch.rand(n).to(dtype) if weighted else None, bandwidth)
    assert_near_reference(value_and_gradient(backend, *arguments), arguments, 2e-9 if dtype == F64 else 1e-7)


def test_smooth_ece_of_masses_at_the_ends(backend):
    """Which are a run of one bin, and share out to nodes beyond."""
    f = torch.cat([torch.zeros(400), torch.ones(500), torch.rand(100)]).double()
    arguments = (f, torch.rand(1000) < 0.8 * f + 0.15, None, 0.0)
    assert_near_reference(value_and_gradient(backend, *arguments), arguments)


@pytest.mark.full
@pytest.mark.parametrize("bandwidth", [0.0, 0.03])
def test_smooth_ece_in_tiles_as_they_are_launched(bandwidth, backend):
    for name in ("smooth_ece", "smooth_ece_gradient"):
        importlib.reload(importlib.import_module(f"calguide_fast.backends.triton.{name}"))
    f, y = predictions(20_000, 1.1)
    arguments = (f, y, torch.rand(len(f), dtype=F64), bandwidth)
    assert_near_reference(value_and_gradient(backend, *arguments), arguments)


def test_smooth_ece_finds_a_double_root_between_two_looks(backend):
    """R dips through 0 between two points of the grid, and shows it at neither."""
    f, y = torch.tensor([0.2062, 0.4562, 0.7062], dtype=F64), torch.tensor([False, True, False])
    arguments = (f, y, torch.tensor([1.0, 0.062, 1.0], dtype=F64), 0.1)
    assert_near_reference(value_and_gradient(backend, *arguments), arguments, 1e-9)


def test_smooth_ece_does_not_depend_on_the_order(backend):
    """To the bit: programs add to the same sums in whatever order they run."""
    f, y = predictions(20_000, 1.5, F32)
    order = torch.randperm(len(f))
    stats, grad = value_and_gradient(backend, f, y, None, 0.1)
    again, grad_again = value_and_gradient(backend, f[order], y[order], None, 0.1)
    assert torch.equal(stats, again) and torch.equal(grad[order], grad_again)


def test_residuals_that_cancel_do_so_exactly(backend):
    f, y = torch.full((6,), 0.25, dtype=F64), torch.tensor([True, False, False, False, False, False])
    stats, grad = value_and_gradient(backend, f, y, torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=F64), 0.0)
    assert stats.tolist() == [0.0, 1e-3] and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(
    ("confidence", "weights"),
    [
        (math.nan, None),
        (-1e-9, [1.0, 1.0]),
        (0.5, [math.inf, 1.0]),
        (0.5, [math.nan, 1.0]),
        (0.5, [-1.0, 2.0]),
        (0.5, [0.0, 0.0]),
        (0.5, [1e-310, 1e-310]),
        (0.5, [1e290, 1e290]),
    ],
)
def test_smooth_ece_of_what_is_not_allowed_is_nan(confidence, weights, backend):
    f, y = torch.tensor([confidence, 0.5], dtype=F64), torch.tensor([True, False])
    w = None if weights is None else torch.tensor(weights, dtype=F64)
    stats, grad = value_and_gradient(backend, f, y, w, 0.0)
    assert stats.isnan().all() and grad.shape == (2,) and grad.isnan().all()
