"""Every kernel on every path, at sizes that leave tails: what compute-sanitizer is run on, as quick as that allows."""

from __future__ import annotations

import pytest
import torch

from calguide_fast import guidance_gradient, guided_step, predict_x0, smooth_ece, tilt_weights, use_backend
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.ops.top_label import top_label
from calguide_fast.schedule import Schedule

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request, monkeypatch):
    # a poisoned output would count as written before the kernel writes it
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("num_classes", "divergence"),
    [(1, "forward_kl"), (37, "js"), (1001, "chi2"), (5003, "forward_kl"), (21843, "js"), (70001, "chi2")],
)
def test_guidance(num_classes, divergence, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(5, num_classes).to(dtype)
        labels = torch.tensor([0, num_classes - 1, -1, num_classes, 2**40])
        for laid_out in (logits.cuda(), logits.t().contiguous().cuda().t()):
            grad = guidance_gradient(laid_out, labels.cuda(), divergence).grad.cpu()
            assert grad[:2].isfinite().all() and grad[2:].isnan().all()


@pytest.mark.parametrize("num_classes", [10, 1001, 5003])
def test_top_label(num_classes, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = torch.randn(5, num_classes).to(dtype), torch.tensor([0, num_classes - 1, -1, 0, 0])
        for laid_out in (logits.cuda(), logits.t().contiguous().cuda().t()):
            leaf = laid_out.requires_grad_()
            confidence, top, _ = top_label(leaf, labels.cuda())
            (grad,) = torch.autograd.grad(confidence.sum(), leaf)
            assert torch.equal(top.cpu(), logits.argmax(1))
            assert torch.equal(grad.isnan().any(1).cpu(), torch.arange(5) == 2)


@pytest.mark.parametrize(
    ("shape", "method"), [((3, 3, 7, 5), "ddpm"), ((2, 3, 16, 16), "ddim"), ((7, 1, 1, 1), "ddpm")]
)
def test_step(method, shape, kernels):
    batch, channels, *sides = shape
    x_t, output = torch.randn(shape).cuda(), torch.randn(batch, 2 * channels, *sides).half().cuda()
    gradient, scores = torch.randn(shape).cuda(), torch.randn(batch).cuda()
    row, seeds = Schedule.linear().respaced(25).coefficients()[9].cuda(), torch.arange(batch).cuda()
    boost = {"variance_max": torch.zeros(batch).cuda(), "sine_boost": 0.3} if method == "ddpm" else {}
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = output.contiguous(memory_format=layout)
        x0 = predict_x0(x_t, laid_out, row, memory_format=layout)
        steered = gradient.contiguous(memory_format=layout)
        x_prev = guided_step(
            x_t, laid_out, row, steered, method=method, seeds=seeds, scores=scores, tilt=0.3, out=x_t, **boost
        )
        assert x0.cpu().isfinite().all() and x_prev.cpu().isfinite().all()


def test_weights_and_noise(kernels):
    for count in (1, 5, 300):
        assert tilt_weights(torch.randn(count).cuda(), -0.4, max_weight=2.0).cpu().isfinite().all()
        assert sampling_noise(torch.arange(count).cuda(), (3, 7, 5), 2).cpu().isfinite().all()


@pytest.mark.parametrize(("count", "bandwidth"), [(1025, None), (65_537, 0.01)])
def test_smooth_ece(count, bandwidth, kernels):
    for dtype in (torch.float32, torch.float64):
        confidence = torch.rand(count, dtype=dtype)
        confidence[::3] = 1.0
        correct = torch.rand(count) < confidence
        leaf = confidence.cuda().requires_grad_()
        for weights in (None, torch.rand(count).cuda()):
            value = smooth_ece(leaf, correct.cuda(), bandwidth, weights).value
            (grad,) = torch.autograd.grad(value, leaf)
            assert value.isfinite() and grad.cpu().isfinite().all()
