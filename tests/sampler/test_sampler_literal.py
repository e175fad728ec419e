"""The sampler replays literal loops draw for draw: DDPM, DDIM, ADM-G, EluCD, and each setting of the guidance."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import NAMES, assert_near, literal_score
from literal import ddim, ddpm, double, gradient_at, linear_alphas_cumprod
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance

N = 4
LABELS = torch.tensor([0, 3, 4, 1])
STEPS = "8"
TIMESTEPS = [0, 143, 285, 428, 571, 714, 856, 999]
# x̂₀ at the noisiest step multiplies a rounding of 1e-7 by 160
TOLERANCE = 1e-4


def draws(steps: int = 8) -> torch.Tensor:
    return torch.randn(steps + 1, N, 3, 6, 6)


def sample(model, classifier=None, guidance=None, noise=None, method="ddpm", **options) -> torch.Tensor:
    sampler = FDivSampler(model, classifier, guidance, **options)
    return sampler.sample(LABELS, seeds=range(N), steps=STEPS, method=method, noise=noise, progress=False).images


def guided_score(net, x, t=None, **settings):
    """The definition's score of a classifier's logits: score, log-probability, entropy, divergence."""
    return literal_score(net(x) if t is None else net(x, t), LABELS, **settings)


def assert_replays(found, expected, unguided=None):
    assert_near(found, expected, TOLERANCE, "images")
    if unguided is not None:
        moved = (expected - unguided).abs().max()
        assert moved > 50 * TOLERANCE, f"guidance must matter for the test to mean something, moved {moved}"


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance, learned, clip, backend):
    model, noise = unet(learned_variance=learned), draws()
    found = sample(model, noise=noise, variance=variance, clip_denoised=clip)
    expected = ddpm(double(model), noise.double(), TIMESTEPS, variance=variance, clip=clip)
    # without the clip nothing holds the images near 1
    assert_near(found, expected, TOLERANCE, size=expected.abs().max() if not clip else None)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(eta, learned, backend):
    model, noise = unet(learned_variance=learned), draws()
    found = sample(model, noise=noise, method="ddim", eta=eta)
    assert_replays(found, ddim(double(model), noise.double(), TIMESTEPS, eta=eta))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("learned", [True, False])
def test_adm_g(learned, method, backend):
    """Dhariwal and Nichol: the gradient of log p(y | x_t, t), as a shift of the mean (DDPM) or of ε (DDIM)."""
    model, guide, noise, scale = unet(learned_variance=learned), classifier(timed=True), draws(), 3.0
    guidance = Guidance("none", marginal_temperature=1.0, scale=scale)
    found = sample(model, guide, guidance, noise, method, classifier_input="xt")
    wide = double(guide)

    def push(x, x0, t, k):
        return scale * gradient_at(lambda x: wide(x, t).log_softmax(1)[range(N), LABELS], x)

    loop = {"ddpm": ddpm, "ddim": ddim}[method]
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, loop(*arguments, push), loop(*arguments))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_elucd(gamma, scale, backend):
    """Ma et al.: an off-the-shelf classifier at x̂₀, two temperatures and the sine boost by each image's own maximum."""
    model, guide, noise = unet(), classifier(), draws()
    found = sample(model, guide, Guidance("none", scale=scale, sine_boost=gamma), noise)
    wide = double(guide)

    def push(x, x0, t, k):
        def score(x0):
            logits = wide(x0)
            return logits[range(N), LABELS] - (0.5 * logits).logsumexp(1)

        return scale * gradient_at(score, x0)

    arguments = (double(model), noise.double(), TIMESTEPS)
    expected = ddpm(*arguments, push, gamma=gamma)
    assert_replays(found, expected, ddpm(*arguments))
    if gamma:
        assert (expected - ddpm(*arguments, push)).abs().max() > 5 * TOLERANCE, "the boost must matter"


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("divergence", NAMES)
def test_every_divergence(divergence, method, backend):
    model, guide, noise = unet(), classifier(), draws()
    settings = {"divergence": divergence, "alpha": 0.7, "epsilon": 0.8}
    found = sample(model, guide, Guidance(scale=2.0, **settings), noise, method)
    wide = double(guide)

    def push(x, x0, t, k):
        return 2.0 * gradient_at(lambda x0: guided_score(wide, x0, **settings)[0], x0)

    loop = {"ddpm": ddpm, "ddim": ddim}[method]
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, loop(*arguments, push), loop(*arguments))


SCORES = {
    "temperatures": {"joint_temperature": 1.6, "marginal_temperature": 0.2},
    "entropy": {"entropy_weight": 1.2},
    "adaptive": {"entropy_weight": 2.0, "adaptive_entropy": True},
}


@pytest.mark.parametrize("setting", SCORES)
@pytest.mark.parametrize("classifier_input", ["x0", "xt"])
def test_score_settings(classifier_input, setting, backend):
    model, guide, noise = unet(), classifier(timed=classifier_input == "xt"), draws()
    found = sample(model, guide, Guidance(scale=2.0, **SCORES[setting]), noise, classifier_input=classifier_input)
    wide = double(guide)

    def push(x, x0, t, k):
        if classifier_input == "x0":
            return 2.0 * gradient_at(lambda x0: guided_score(wide, x0, **SCORES[setting])[0], x0)
        return 2.0 * gradient_at(lambda x: guided_score(wide, x, t, **SCORES[setting])[0], x)

    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(*arguments, push), ddpm(*arguments))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("tilt_max", [None, 1.1])
@pytest.mark.parametrize("tilt_on", ["log_prob", "score"])
@pytest.mark.parametrize("tilt", [-0.8, 1.5])
def test_tilt(tilt, tilt_on, tilt_max, method, backend):
    """The gradient of the tilted objective over the batch, times B; the clip apart, it is autograd's."""
    model, guide, noise = unet(), classifier(), draws()
    found = sample(model, guide, Guidance(tilt=tilt, tilt_on=tilt_on, tilt_max=tilt_max, scale=2.0), noise, method)
    wide = double(guide)

    def push(x, x0, t, k):
        score, log_prob, _, _ = guided_score(wide, x0)
        tilted = (log_prob if tilt_on == "log_prob" else score).detach().requires_grad_()
        objective = (tilt * tilted).exp().mean().log() / tilt
        weights = N * torch.autograd.grad(objective, tilted)[0]
        if tilt_max is not None:
            weights = weights.clamp(max=tilt_max)
        return 2.0 * weights[:, None, None, None] * gradient_at(lambda x0: guided_score(wide, x0)[0], x0)

    loop = {"ddpm": ddpm, "ddim": ddim}[method]
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, loop(*arguments, push), loop(*arguments))


@pytest.mark.parametrize("largest", [1.2, 100.0])
def test_entropy_scaling(largest, backend):
    """ED-DPM: the image gradient times log C / H, clamped."""
    model, guide, noise = unet(), classifier(), draws()
    found = sample(model, guide, Guidance(entropy_scaling=largest, scale=2.0), noise)
    wide = double(guide)

    def push(x, x0, t, k):
        entropy = guided_score(wide, x0)[2].detach()
        factor = (math.log(5) / entropy).clamp(max=largest)
        return 2.0 * factor[:, None, None, None] * gradient_at(lambda x0: guided_score(wide, x0)[0], x0)

    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(*arguments, push), ddpm(*arguments))


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("interval", [(0.3, 10.0), (0.0, 1.0), (2.0, math.inf)])
def test_interval(interval, gamma, backend):
    """Guided where lo < σ ≤ hi only; the running maximum of the boost goes on meanwhile."""
    model, guide, noise = unet(), classifier(), draws()
    calls = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    found = sample(model, guide, Guidance(interval=interval, scale=3.0, sine_boost=gamma), noise)
    wide, guided = double(guide), []

    def push(x, x0, t, k):
        bar = linear_alphas_cumprod()[int(t[0])]
        if not interval[0] < math.sqrt((1 - bar) / bar) <= interval[1]:
            return None
        guided.append(k)
        return 3.0 * gradient_at(lambda x0: guided_score(wide, x0)[0], x0)

    called = len(calls)
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(*arguments, push, gamma=gamma), ddpm(*arguments))
    assert called == len(guided) and 0 < called < 8, "outside the interval the classifier is not called"


@pytest.mark.parametrize("learned", [True, False])
def test_classifier_free_guidance(learned, backend):
    """ε̂_u + w (ε̂_c − ε̂_u), with the conditional model's variance, alone and along with a classifier."""
    model, guide, noise = unet(num_classes=5, learned_variance=learned), classifier(), draws()
    wide, wide_guide = double(model), double(guide)
    nothing = torch.full_like(LABELS, 5)

    def mixed(x, t):
        conditional, unconditional = wide(x, t, LABELS.to(x.device)), wide(x, t, nothing.to(x.device))
        eps = unconditional[:, :3] + 2.5 * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([eps, conditional[:, 3:]], 1)

    def push(x, x0, t, k):
        return 2.0 * gradient_at(lambda x0: guided_score(wide_guide, x0)[0], x0)

    options = {"cfg_scale": 2.5, "null_class": 5}
    found = sample(model, noise=noise, **options)
    plain = ddpm(lambda x, t: wide(x, t, LABELS.to(x.device)), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(mixed, noise.double(), TIMESTEPS), plain)
    found = sample(model, guide, Guidance(scale=2.0), noise, **options)
    assert_replays(found, ddpm(mixed, noise.double(), TIMESTEPS, push), ddpm(mixed, noise.double(), TIMESTEPS))


def test_conditional_model_and_model_kwargs(backend):
    model, noise = unet(num_classes=5), draws()
    wide = double(model)
    found = sample(model, noise=noise, model_kwargs={"shift": 0.2})
    assert_replays(found, ddpm(lambda x, t: wide(x, t, LABELS.to(x.device), shift=0.2), noise.double(), TIMESTEPS))
    unconditional = sample(unet(), noise=noise, class_conditional=False)
    assert_replays(unconditional, ddpm(double(unet()), noise.double(), TIMESTEPS))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_cond_fn(method, backend):
    """guided-diffusion's convention: cond_fn(x_t, t, y=…) gives the image gradient itself."""
    model, guide, noise = unet(), classifier(timed=True), draws()
    wide = double(guide)

    def cond_fn(x, t, y=None, net=guide):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = net(x, t).log_softmax(1)[range(len(x)), y]
            return torch.autograd.grad(chosen.sum(), x)[0]

    def push(x, x0, t, k):
        return 2.0 * cond_fn(x, t, LABELS, wide)

    found = sample(model, None, Guidance(scale=2.0), noise, method, cond_fn=cond_fn)
    loop = {"ddpm": ddpm, "ddim": ddim}[method]
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, loop(*arguments, push), loop(*arguments))


def test_classifier_transform(backend):
    model, guide, noise = unet(), classifier(), draws()
    wide = double(guide)

    def transform(x0):
        return torch.nn.functional.avg_pool2d(x0 * 0.5 + 0.1, 2)

    def push(x, x0, t, k):
        return 2.0 * gradient_at(lambda x0: guided_score(wide, transform(x0))[0], x0)

    found = sample(model, guide, Guidance(scale=2.0), noise, classifier_transform=transform)
    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(*arguments, push), ddpm(*arguments))


def test_everything_at_once(backend):
    model, guide, noise = unet(), classifier(), draws()
    settings = {"divergence": "forward_kl", "alpha": 0.4, "entropy_weight": 0.5, "adaptive_entropy": True}
    guidance = Guidance(scale=3.0, tilt=-0.5, entropy_scaling=3.0, sine_boost=0.4, interval=(0, 100), **settings)
    found = sample(model, guide, guidance, noise)
    wide = double(guide)

    def push(x, x0, t, k):
        if k == 7:  # σ = 157
            return None
        _, log_prob, entropy, _ = guided_score(wide, x0, **settings)
        factor = (math.log(5) / entropy).clamp(max=3.0) * N * (-0.5 * log_prob).softmax(0)
        return (
            3.0
            * factor.detach()[:, None, None, None]
            * gradient_at(lambda x0: guided_score(wide, x0, **settings)[0], x0)
        )

    arguments = (double(model), noise.double(), TIMESTEPS)
    assert_replays(found, ddpm(*arguments, push, gamma=0.4), ddpm(*arguments))
