"""Heun and DPM-Solver++(2M): literal loops draw for draw, exact solutions, one equation with DDIM, and EluCD's rule."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near, literal_score
from literal import double, gradient_at
from literal_solvers import dpmpp_2m, elucd_rule, eps_denoiser, heun, karras, time_at
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance
from calguide_fast.demo.checkpoints import load_guide, load_judge, load_unet
from calguide_fast.schedule import Schedule

N, STEPS = 4, 7
LABELS = torch.tensor([0, 3, 4, 1])
# x at the first noise level is 80 times larger than an image
TOLERANCE = 1e-4
CHURN = {"churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.01}


def draws(steps: int = STEPS) -> torch.Tensor:
    return torch.randn(steps + 1, N, 3, 6, 6)


def sample(sampler: FDivSampler, noise=None, method="heun", steps=STEPS, **options) -> torch.Tensor:
    options = {"seeds": range(N), "progress": False, **options}
    return sampler.sample(LABELS, steps=steps, method=method, noise=noise, **options).images


def guided(guide, denoise, scale: float, sees_x0: bool, clip: bool = True, **settings):
    """D plus σ² times the score's gradient with respect to x, clipped; at x0, as if x0's gradient were x_t's."""
    wide = double(guide)

    def denoised(x, sigma, guides):
        d = denoise(x, sigma)
        if not guides:
            return d.clamp(-1, 1) if clip else d
        shrink = 1 / math.sqrt(1 + sigma**2)
        if sees_x0:
            seen = d.clamp(-1, 1) if clip else d
            gradient = shrink * gradient_at(lambda x0: literal_score(wide(x0), LABELS, **settings)[0], seen)
        else:
            t = torch.full((len(x),), time_at(sigma), dtype=torch.float64)
            gradient = gradient_at(lambda x: literal_score(wide(x * shrink, t), LABELS, **settings)[0], x)
        d = d + sigma**2 * scale * gradient
        return d.clamp(-1, 1) if clip else d

    return denoised


def literal(method, denoised, noise, sigmas, guides=lambda sigma: True, **options):
    noise = noise.double()
    if method == "dpmpp":
        return dpmpp_2m(denoised, noise[0], sigmas, guides)
    return heun(denoised, noise, sigmas, guides, **options)


@pytest.mark.parametrize("classifier_input", ["x0", "xt", None])
@pytest.mark.parametrize(("method", "churn"), [("heun", {}), ("heun", CHURN), ("dpmpp", {})], ids=str)
def test_literal_loops(method, churn, classifier_input, backend):
    model, guide, noise = unet(), classifier(timed=classifier_input == "xt"), draws()
    settings = {"divergence": "reverse_kl", "alpha": 0.6}
    options = {"guidance": Guidance(scale=3.0, **settings), "classifier_input": classifier_input}
    sampler = FDivSampler(model, guide, **options, **churn) if classifier_input else FDivSampler(model, **churn)
    found = sample(sampler, noise, method)
    plain = eps_denoiser(double(model))
    denoised = guided(guide, plain, 3.0 if classifier_input else 0.0, classifier_input == "x0", **settings)
    arguments = method, denoised, noise, karras(STEPS)
    expected = literal(*arguments, **churn)
    assert_near(found, expected, TOLERANCE, "images")
    if classifier_input:
        moved = (expected - literal(*arguments, lambda sigma: False, **churn)).abs().max()
        assert moved > 50 * TOLERANCE, f"guidance must matter for the test to mean something, moved {moved}"


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
def test_without_a_clip(method):
    model, guide, noise = unet(learned_variance=False), classifier(), draws()
    sampler = FDivSampler(model, guide, scale=3.0, clip_denoised=False)
    expected = literal(method, guided(guide, eps_denoiser(double(model)), 3.0, True, clip=False), noise, karras(STEPS))
    assert_near(sample(sampler, noise, method), expected, TOLERANCE, size=expected.abs().max())


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
@pytest.mark.parametrize("interval", [(0.3, 10.0), (0.0, 1.0), (2.0, math.inf)])
def test_interval(interval, method):
    """In σ, for each evaluation of the model by itself."""
    model, guide, noise = unet(), classifier(), draws()
    calls = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    sampler = FDivSampler(model, guide, Guidance(interval=interval, scale=3.0))
    found, called, evaluated = sample(sampler, noise, method), len(calls), []
    denoised = guided(guide, eps_denoiser(double(model)), 3.0, True)

    def counting(x, sigma, guides):
        evaluated.append(guides)
        return denoised(x, sigma, guides)

    expected = literal(method, counting, noise, karras(STEPS), lambda sigma: interval[0] < sigma <= interval[1])
    assert_near(found, expected, TOLERANCE)
    assert called == sum(evaluated) and 0 < called < len(evaluated)


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
def test_classifier_free_guidance_and_a_tilt(method):
    model, guide, noise = unet(num_classes=5), classifier(), draws()
    wide, nothing = double(model), torch.full_like(LABELS, 5)

    def mixed(x, t):
        conditional, unconditional = wide(x, t, LABELS), wide(x, t, nothing)
        return unconditional + 2.5 * (conditional - unconditional)

    plain, wide_guide = eps_denoiser(mixed), double(guide)

    def denoised(x, sigma, guides):
        d = plain(x, sigma)
        x0 = d.clamp(-1, 1)
        weights = N * (-0.7 * literal_score(wide_guide(x0), LABELS)[1]).softmax(0).detach()
        gradient = gradient_at(lambda x0: literal_score(wide_guide(x0), LABELS)[0], x0)
        return (d + sigma**2 / math.sqrt(1 + sigma**2) * 2.0 * weights[:, None, None, None] * gradient).clamp(-1, 1)

    sampler = FDivSampler(model, guide, Guidance(scale=2.0, tilt=-0.7), cfg_scale=2.5, null_class=5)
    assert_near(sample(sampler, noise, method), literal(method, denoised, noise, karras(STEPS)), TOLERANCE)


@pytest.mark.parametrize("add_factor", [0.0, 0.3])
@pytest.mark.parametrize("churn", [{}, CHURN], ids=["plain", "churned"])
def test_elucds_edm_rule(churn, add_factor, backend):
    model, guide, noise = unet(), classifier(), draws()
    wide = double(guide)
    options = {"divergence": "none", "marginal_temperature": 0.0}
    found = [
        sample(
            FDivSampler(
                model,
                guide,
                Guidance(rule="edm", max_guidance=0.05, add_factor=add_factor, scale=scale, **options),
                **churn,
            ),
            noise,
        )
        for scale in (1.0, 1e-20, 0.0)
    ]
    plain = eps_denoiser(double(model))

    def gradient(x):
        return gradient_at(lambda x: literal_score(wide(x), LABELS, **options)[0], x)

    def denoised(x, sigma, guides):
        return plain(x, sigma).clamp(-1, 1)

    rule = elucd_rule(gradient, STEPS, 0.05, add_factor)
    unguided = heun(denoised, noise.double(), karras(STEPS), **churn)
    expected = heun(denoised, noise.double(), karras(STEPS), rule=rule, **churn)
    assert (expected - unguided).abs().max() > 20 * TOLERANCE
    assert_near(found[0], expected, TOLERANCE)
    assert_near(found[1], expected, TOLERANCE, "scale cancels")
    assert_near(found[2], unguided, TOLERANCE, "a gradient of 0 adds 0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_the_sign_of_scale_counts_in_elucds_rule(dtype):
    """However large or small it is, beside a gradient of any precision."""
    guide, noise = classifier().to(dtype), draws()

    def image(scale):
        guidance = Guidance("none", rule="edm", max_guidance=0.05, scale=scale)
        return sample(FDivSampler(unet(), guide, guidance), noise)

    expected = image(1.0)
    for scale in (1e-30, 1e30):
        assert torch.equal(image(scale), expected)
    assert (image(-1.0) - expected).abs().max() > 0.1


class Gaussian(torch.nn.Module):
    """The exact denoiser of images N(mean, deviation²), with mean read off the label if there is one."""

    in_channels, image_size, sigma_min, sigma_max = 3, 6, 0.0, math.inf
    deviation = 0.5

    def __init__(self, class_conditional=False):
        super().__init__()
        self.class_conditional = class_conditional
        self.seen = []

    def mean(self, y=None):
        return 0.3 if y is None else 0.2 * y.float()[:, None, None, None]

    def denoise(self, x, sigma, y=None):
        assert x.dtype == sigma.dtype == torch.float32 and sigma.shape == (len(x),)
        self.seen.append(float(sigma[0]))
        noise, signal = sigma[:, None, None, None] ** 2, self.deviation**2
        return (signal * x + noise * self.mean(y)) / (signal + noise)

    def solution(self, start, y=None):
        """At σ = 0, of the equation that begins with ``start`` at σ = 80."""
        return self.mean(y) + (80 * start - self.mean(y)) * self.deviation / math.hypot(self.deviation, 80)


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
def test_order_of_convergence_is_two(method):
    net, noise = Gaussian().eval(), draws()[0]
    errors = []
    for steps in (12, 24, 48):
        found = sample(FDivSampler(net), noise[None].expand(steps + 1, -1, -1, -1, -1), method, steps)
        errors.append(float((found - net.solution(noise)).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert errors[-1] < 0.03 and all(1.8 < order < 2.5 for order in orders), (errors, orders)


@pytest.mark.parametrize("method", ["heun", "dpmpp"])
def test_an_edm_denoiser_is_used_as_it_is(method):
    """Where EDM's sampler looks, with labels and free guidance, unclipped."""
    net, noise = Gaussian(class_conditional=True).eval(), draws(60)
    found = sample(FDivSampler(net), noise, method, 60)
    assert_near(found, net.solution(noise[0], LABELS).double(), 2e-2)
    assert found.max() > 1.5
    levels = karras(60, 0.002, 80.0)[:-1]
    assert sorted(set(net.seen), reverse=True) == pytest.approx(levels, rel=1e-5)
    net.seen.clear()
    sample(FDivSampler(net, sigma_range=(0.1, 5.0)), noise, method, 60)
    assert (net.seen[0], net.seen[-1]) == pytest.approx((5.0, 0.1))
    # the label 5 stands for none, and its mean is 1: means are linear, and the deviation is one and the same
    mixed = sample(FDivSampler(net, cfg_scale=2.0, null_class=5), noise, method, 60)
    assert_near(mixed, net.solution(noise[0], 2 * LABELS - 5).double(), 2e-2)


@pytest.mark.parametrize("classifier_input", ["x0", "xt"])
def test_ddim_solves_the_same_guided_equation(classifier_input):
    """With one scale, whatever the method and the classifier's input: all take g for the gradient at x_t."""
    model, guide, noise = unet(), classifier(timed=classifier_input == "xt"), draws(1)[0]
    # the part of the schedule between two noise levels
    first, last = round(time_at(0.05)), round(time_at(10.0))
    part = Schedule(Schedule.linear().alphas_cumprod[first : last + 1])

    def later(network):
        return lambda x, t=None: network(x) if t is None else network(x, t + first)

    options = {"classifier_input": classifier_input, "clip_denoised": False, "shape": (3, 6, 6)}

    def image(scale, method, steps):
        sampler = FDivSampler(later(model), later(guide), Guidance(scale=scale), part, **options)
        # DDIM begins with x_t = n, the solvers with x = σ n
        begin = noise if method == "ddim" else noise / math.sqrt(1 - part.alphas_cumprod[-1])
        return sample(sampler, lambda: begin, method, steps)

    def what_guidance_did(method, steps):
        return image(2.0, method, steps) - image(0.0, method, steps)

    expected = what_guidance_did("ddim", 200)
    assert expected.abs().max() > 0.3
    for method in ("heun", "dpmpp"):
        assert (what_guidance_did(method, 30) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("method", "steps"), [("heun", 10), ("dpmpp", 18)])
def test_digits_are_the_ones_asked_for(method, steps):
    """In a tenth of DDPM's usual steps, by the judgement of a classifier that did not guide them."""
    labels = torch.arange(40) % 10
    sampler = FDivSampler(load_unet(), load_guide(softplus_beta=3.0), Guidance("js", alpha=3.0, scale=0.2))
    images = sampler.sample(labels, range(40), steps, method, progress=False).images
    assert (load_judge()(images).argmax(1) == labels).float().mean() > 0.9
