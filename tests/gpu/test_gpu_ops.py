"""The kernels on a GPU, called directly: values, streams, devices, sizes, graphs, compilers; and never a wait.

The tests of all backends run there as well, by a default device, which is a function mode: not the direct path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from formulas import NAMES, assert_near, literal
from torch._subclasses.fake_tensor import FakeTensorMode

from calguide_fast import (
    guidance_gradient,
    guidance_score,
    guided_step,
    predict_x0,
    smooth_ece,
    tilt_weights,
    use_backend,
)
from calguide_fast.ops._library import is_direct
from calguide_fast.ops.guidance import guidance_settings
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.smooth_ece import smooth_ece_from_logits
from calguide_fast.ops.top_label import _gradient, top_label
from calguide_fast.schedule import Schedule

pytestmark = pytest.mark.gpu

TABLE = Schedule.linear().respaced("25").coefficients()
GIB = 1 << 30


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error wherever the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def everything(device: str = "cuda", seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of all the ops, the same on every device."""
    torch.manual_seed(seed)
    x_t, output, gradient, noise = torch.randn(6, 3, 8, 8), torch.randn(6, 6, 8, 8), *torch.randn(2, 6, 3, 8, 8)
    tensors = {"logits": torch.randn(6, 1000) * 3, "labels": torch.randint(1000, (6,)), "x_t": x_t, "output": output}
    tensors |= {"row": TABLE[9], "gradient": gradient, "noise": noise, "running": torch.zeros(6)}
    tensors["seeds"] = torch.tensor([5, -6, 0, 2**62, -(2**63), 7])
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def use_everything(logits, labels, x_t, output, row, gradient, noise, running, seeds) -> tuple[torch.Tensor, ...]:
    found = guidance_gradient(logits, labels, "js", entropy_weight=0.2, adaptive_entropy=True)
    weights = tilt_weights(found.log_prob, -0.2, max_weight=2.0)
    x0 = predict_x0(x_t, output, row)
    last = predict_x0(x_t, output, row, dtype=torch.bfloat16, memory_format=torch.channels_last)
    options = {"weights": weights, "scale": 2.0, "variance_max": running, "sine_boost": 0.3}
    given = guided_step(x_t, output, row, gradient, noise=noise, **options)
    seeded = guided_step(x_t, output, row, gradient, seeds=seeds, scores=found.score, tilt=0.3, method="ddim")
    drawn = sampling_noise(seeds, (3, 8, 8), 4)
    confidence, top, correct = top_label(logits, labels)
    labelled = confidence, _gradient(confidence, logits, confidence, top), top.float(), correct.float()
    return found.grad, found.score, found.divergence, weights, x0, last, given, seeded, drawn, running + 0, *labelled


def test_results_are_the_cpus_to_rounding(kernels):
    tensors = everything()
    assert is_direct(*tensors.values())
    found = use_everything(**tensors)
    with use_backend("cpu"):
        expected = use_everything(**everything("cpu"))
    for got, wanted in zip(found, expected, strict=True):
        assert got.is_cuda and got.dtype == wanted.dtype and got.stride() == wanted.stride()
        assert_near(got.cpu().float(), wanted.double(), 2e-5 if got.dtype == torch.float32 else 8e-3)
    assert torch.equal(found[8].cpu(), expected[8]), "noise has the same bits on every device"


@pytest.mark.parametrize("num_classes", [1, 10, 1000, 21843])
@pytest.mark.parametrize("divergence", NAMES)
def test_gradient_is_the_definitions(divergence, num_classes, kernels):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(33, num_classes) * 3).to(dtype)
        labels = torch.randint(num_classes, (33,))
        expected = literal(logits, labels, divergence=divergence)
        found = guidance_gradient(logits.cuda(), labels.cuda(), divergence)
        for name in found._fields:
            assert_near(getattr(found, name).cpu(), getattr(expected, name), 5e-6, name)


@pytest.mark.parametrize("label", [-1, 10, 2**40, -(2**40)])
def test_a_label_out_of_range_gives_a_row_of_nan(label, kernels):
    """No check may wait for the device. The other rows are as they would be."""
    logits, labels = torch.randn(5, 10, device="cuda"), torch.tensor([0, 9, label, 3, 4], device="cuda")
    with no_waiting():
        found = guidance_gradient(logits, labels)
    spoilt = torch.tensor([False, False, True, False, False])
    for value in found:
        assert torch.equal(value.cpu().isnan().flatten(1).all(1) if value.ndim > 1 else value.cpu().isnan(), spoilt)
    good = ~spoilt.cuda()
    expected = guidance_gradient(logits[good], labels[good])
    for value, wanted in zip(found, expected):
        assert torch.equal(value[good], wanted)
    with use_backend("reference"), pytest.raises(ValueError, match=rf"labels\[2\]={label} is out of range"):
        guidance_gradient(logits, labels)


@pytest.mark.parametrize("shape", [(7, 1), (140_001, 10), (4097, 33), (300, 1000), (65, 1025), (33, 21843), (9, 70001)])
def test_top_label_is_softmaxs(shape, kernels):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, labels = (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1])
        labels[::2] = logits[::2].argmax(1)
        leaf = logits.cuda().requires_grad_()
        with no_waiting():
            confidence, top, correct = top_label(leaf, labels.cuda())
            (grad,) = torch.autograd.grad(confidence.sum(), leaf)
        assert torch.equal(top.cpu(), logits.argmax(1)) and torch.equal(correct.cpu(), logits.argmax(1) == labels)
        p = logits.double().softmax(1)
        expected = p.max(1).values
        assert_near(confidence.detach().cpu(), expected, 1e-6)
        onehot = torch.nn.functional.one_hot(top.cpu(), shape[1])
        assert_near(grad.cpu(), expected[:, None] * (onehot - p), 1e-6)


def test_a_label_out_of_range_leaves_no_confidence(kernels):
    logits = torch.randn(50, 4, device="cuda")
    labels = torch.randint(4, (50,), device="cuda")
    labels[7] = 4
    with no_waiting():
        confidence, _, correct = top_label(logits, labels)
    assert torch.equal(confidence.isnan().nonzero().flatten().cpu(), torch.tensor([7])) and not correct[7]
    for classwise in (False, True):
        assert smooth_ece_from_logits(logits, labels, classwise=classwise).value.isnan()


def test_no_op_waits_for_the_device(kernels):
    tensors = everything()
    use_everything(**tensors)  # loads what is loaded once
    with no_waiting():
        use_everything(**tensors)
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        tensors["running"].sum().item()


def test_results_repeat_bit_for_bit(kernels):
    tensors = everything()
    first, second = (use_everything(**{**tensors, "running": torch.zeros(6, device="cuda")}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_work_goes_to_the_current_stream(kernels):
    tensors = everything()
    expected = use_everything(**{name: tensor.clone() for name, tensor in tensors.items()})
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # the arguments get their values long after the kernels are launched
        torch.cuda._sleep(50_000_000)
        for name, tensor in late.items():
            tensor.copy_(tensors[name])
        found = use_everything(**late)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_work_goes_to_the_tensors_device(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is present, and the test takes two")
    tensors = everything("cuda:1")
    with torch.cuda.device(0):
        found = use_everything(**{name: tensor.clone() for name, tensor in tensors.items()})
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        expected = use_everything(**tensors)
    assert all(a.device.index == 1 and torch.equal(a, b) for a, b in zip(found, expected))


def test_a_cuda_graph_records_every_op(kernels):
    held = everything()
    # compiles what is compiled at the first call
    use_everything(**held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = use_everything(**held)
    for seed in (1, 2):
        for name, tensor in everything(seed=seed).items():
            held[name].copy_(tensor)
        graph.replay()
        expected = use_everything(**everything(seed=seed))
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, kernels):
    torch._dynamo.reset()
    tensors = everything()
    compiled = torch.compile(use_everything, fullgraph=True, dynamic=dynamic)
    found = compiled(**{name: tensor.clone() for name, tensor in tensors.items()})
    for got, wanted in zip(found, use_everything(**tensors)):
        assert_near(got.float(), wanted.double(), 1e-5)


def test_fake_tensors_have_the_real_shapes(kernels):
    real = use_everything(**everything())
    tensors = everything()
    with FakeTensorMode() as mode:
        fake = use_everything(**{name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_opcheck(kernels):
    t = everything()
    settings = guidance_settings("js", 1.0, 0.9, 1.0, 0.5, 0.3, True)
    ops = torch.ops.calguide_fast
    step = (t["x_t"], t["output"], t["row"], t["gradient"], None, None, t["noise"], None)
    numbers = (0, True, 1.5, 0.0, math.inf, False)
    torch.library.opcheck(ops.guidance_gradient.default, (t["logits"], t["labels"], *settings))
    torch.library.opcheck(ops.top_label.default, (t["logits"], t["labels"]))
    torch.library.opcheck(
        ops.top_label_backward.default,
        (torch.randn(6, device="cuda"), t["logits"], torch.rand(6, device="cuda"), t["labels"]),
    )
    torch.library.opcheck(ops.tilt_weights.default, (torch.randn(6, device="cuda"), 0.4, False, 2.0))
    torch.library.opcheck(ops.sampling_noise.default, (t["seeds"], [3, 4, 5], 7, 0))
    torch.library.opcheck(ops.predict_x0.default, (*step[:3], True, torch.float16, torch.channels_last))
    torch.library.opcheck(ops.guided_step.default, (*step, *numbers, 0.0, True))
    torch.library.opcheck(ops.guided_step_with_maximum.default, (*step, t["running"], *numbers, 0.3, True))


def test_score_has_its_gradient(kernels):
    logits, labels = torch.randn(7, 100, device="cuda", requires_grad=True), torch.arange(7, device="cuda")
    (grad,) = torch.autograd.grad(guidance_score(logits, labels, "forward_kl").sum(), logits)
    assert torch.equal(grad, guidance_gradient(logits.detach(), labels, "forward_kl").grad)


def outcomes(kind: str, count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    confidence = torch.rand(count, dtype=torch.float64)
    correct = torch.rand(count, dtype=torch.float64) < (confidence**1.5 if kind == "off" else confidence)
    if kind == "sure":
        confidence[::2], confidence[1::6] = 1.0, 0.0
    return confidence.to(dtype).cuda(), correct.cuda()


def value_and_gradient(confidence, correct, bandwidth=None, weights=None) -> list[torch.Tensor]:
    leaf = confidence.detach().requires_grad_()
    value, sigma = smooth_ece(leaf, correct, bandwidth, weights)
    return [value.detach(), sigma, torch.autograd.grad(value, leaf)[0]]


@pytest.mark.parametrize("bandwidth", [None, 0.001, 0.01, 0.1, 3.0])
@pytest.mark.parametrize("count", [1, 2, 700, 70_001])
@pytest.mark.parametrize("kind", ["off", "calibrated", "sure"])
def test_smooth_ece_is_the_references(kind, count, bandwidth, kernels):
    for weighted in (False, True):
        confidence, correct = outcomes(kind, count)
        weights = torch.rand(count, dtype=torch.float64, device="cuda") if weighted else None
        found = value_and_gradient(confidence, correct, bandwidth, weights)
        narrow = value_and_gradient(confidence.float(), correct, bandwidth, weights)
        with use_backend("reference"):
            expected = value_and_gradient(confidence, correct, bandwidth, weights)
            expected_narrow = value_and_gradient(confidence.float(), correct, bandwidth, weights)
        for got, wanted, allowed in ((found, expected, 1e-7), (narrow, expected_narrow, 1e-5)):
            size = wanted[2].abs().max().clamp(min=1e-30)
            assert_near(got[0].cpu(), wanted[0].cpu().double(), allowed)
            assert_near(got[1].cpu(), wanted[1].cpu().double(), allowed)
            assert_near((got[2] / size).cpu(), (wanted[2] / size).cpu().double(), 1e-5)


def test_smooth_ece_does_not_wait_and_ignores_the_order(kernels):
    confidence, correct = outcomes("sure", 200_000, torch.float32)
    order = torch.randperm(len(confidence), device="cuda")
    first = value_and_gradient(confidence, correct)
    with no_waiting():
        again = value_and_gradient(confidence, correct)
        shuffled = value_and_gradient(confidence[order], correct[order])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(first[0], shuffled[0]) and torch.equal(first[2][order], shuffled[2])


@pytest.mark.parametrize("spoilt", [-1e-6, 1.001, math.nan])
def test_smooth_ece_of_what_is_not_allowed_is_nan(spoilt, kernels):
    for count in (3, 70_001):
        confidence, correct = outcomes("off", count)
        confidence[count // 2] = spoilt
        with no_waiting():
            found = value_and_gradient(confidence, correct)
        assert all(part.isnan().all() for part in found)


def test_a_cuda_graph_records_the_smooth_ece(kernels):
    held, correct = outcomes("off", 70_001, torch.float32)
    ops, value_grad = torch.ops.calguide_fast, torch.ones((), device="cuda")

    def measured():
        value, sigma, curve = ops.smooth_ece(held, correct, None, 0.0, True)
        return value, sigma, ops.smooth_ece_gradient(held, correct, None, curve, value_grad)

    measured()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = measured()
    for kind in ("calibrated", "sure"):
        held.copy_(outcomes(kind, len(held), torch.float32)[0])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, measured()))


@pytest.fixture
def large() -> Iterator[None]:
    """A test of large tensors, whose memory other processes may want afterwards."""
    yield
    torch.cuda.empty_cache()


def needs_memory(gib: int) -> None:
    found = torch.cuda.get_device_properties(0).total_memory / GIB
    if found < 80:
        pytest.skip(f"the GPU has {found:.0f} GiB; tensors of more than 2^31 elements are tested where there are 80")
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of the GPU's memory are free, and the test takes {gib}")


def test_logits_of_more_than_2_to_the_31_elements(kernels, large):
    needs_memory(24)
    classes = 1 << 15
    logits = torch.empty((1 << 16) + 1, classes, dtype=torch.float16, device="cuda").normal_()
    labels = torch.randint(classes, (len(logits),), device="cuda")
    found = guidance_gradient(logits, labels)
    ends = torch.tensor([0, 1, len(logits) // 2, len(logits) - 2, len(logits) - 1], device="cuda")
    expected = guidance_gradient(logits[ends], labels[ends])
    assert torch.equal(found.grad[ends], expected.grad) and torch.equal(found.score[ends], expected.score)
    del found
    confidence, top, _ = top_label(logits, labels)
    grad = _gradient(confidence, logits, confidence, top)
    some = top_label(logits[ends], labels[ends])
    assert torch.equal(confidence[ends], some[0]) and torch.equal(top[ends], some[1])
    assert torch.equal(grad[ends], _gradient(some[0], logits[ends], some[0], some[1]))


def test_images_of_more_than_2_to_the_31_elements(kernels, large):
    needs_memory(48)
    shape = ((1 << 11) + 1, 1, 1 << 10, 1 << 10)
    x_t = torch.empty(shape, device="cuda").normal_()
    output, gradient = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    seeds, row = torch.arange(len(x_t), device="cuda"), TABLE[9].cuda()
    kept = torch.tensor([0, 1, len(x_t) - 1], device="cuda")
    some = x_t[kept], output[kept], row
    expected = guided_step(*some, gradient[kept], seeds=seeds[kept]), predict_x0(*some, dtype=torch.float16)
    x0 = predict_x0(x_t, output, row, dtype=torch.float16)
    assert torch.equal(x0[kept], expected[1])
    del x0
    guided_step(x_t, output, row, gradient, seeds=seeds, out=x_t)
    assert torch.equal(x_t[kept], expected[0])
