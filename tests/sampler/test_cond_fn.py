"""as_cond_fn in guided-diffusion's loops draws FDivSampler's images."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near
from literal import ddim, ddpm, double
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance, as_cond_fn
from calguide_fast.schedule import Schedule

N = 4
LABELS = torch.tensor([0, 3, 4, 1])
STEPS = "8"
TIMESTEPS = [0, 143, 285, 428, 571, 714, 856, 999]
# x̂₀ at the noisiest step multiplies a rounding of 1e-7 by 160
TOLERANCE = 1e-4
LOOPS = {"ddpm": ddpm, "ddim": ddim}
GUIDANCE = {
    "js": Guidance("js", scale=3.0),
    "tilted": Guidance("reverse_kl", scale=2.0, tilt=-0.8, tilt_max=1.5),
    "interval": Guidance("none", scale=3.0, interval=(0.3, 10.0)),
    "entropy": Guidance("forward_kl", scale=2.0, entropy_weight=0.5, adaptive_entropy=True, entropy_scaling=3.0),
}


def half(x0):
    return torch.nn.functional.avg_pool2d(x0 * 0.5 + 0.1, 2)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("method", LOOPS)
@pytest.mark.parametrize("setting", GUIDANCE)
@pytest.mark.parametrize("sight", ["denoised_fn", "model", "xt"])
def test_a_loop_of_guided_diffusion_draws_what_the_sampler_draws(sight, setting, method, rescaled):
    """Its cond_fn gets x_t and the original timestep, fractional if rescaled, and acts by the step's own variance."""
    guidance, model = GUIDANCE[setting], unet()
    timed, transform = sight == "xt", None if sight == "xt" else half
    guide, noise = classifier(timed=timed), torch.randn(9, N, 3, 6, 6)
    options = {"classifier_input": "xt" if timed else "x0", "classifier_transform": transform}
    sampler = FDivSampler(model, guide, guidance, **options)
    expected = sampler.sample(LABELS, range(N), STEPS, method, noise=noise, progress=False).images

    def model_fn(x, t, y=None):
        assert torch.equal(y, LABELS)
        return model(x, t.long())

    cond_fn = as_cond_fn(guide, guidance, "linear", model=model_fn if sight == "model" else None, **options)

    def push(x, x0, t, k):
        if sight == "denoised_fn":
            assert cond_fn.denoised_fn(x0) is x0
        gradient = cond_fn(x.float(), t.float() if rescaled else t, y=LABELS)
        assert gradient.shape == x.shape and gradient.dtype == torch.float32
        return gradient

    arguments = (double(model), noise.double(), TIMESTEPS)
    found, unguided = LOOPS[method](*arguments, push), LOOPS[method](*arguments)
    assert (found - unguided).abs().max() > 50 * TOLERANCE, "guidance must matter"
    assert_near(expected, found, TOLERANCE, "images")


def test_what_the_loop_predicted_is_clipped_as_asked_and_used_once():
    x0 = 3 * torch.randn(N, 3, 6, 6)
    t = torch.full((N,), 500)
    for clip, seen in ((True, x0.clamp(-1, 1)), (False, x0)):
        cond_fn = as_cond_fn(classifier(), Guidance("js"), clip_denoised=clip)
        cond_fn.denoised_fn(x0)
        expected = Guidance("js").image_gradient(classifier(), seen, LABELS).gradient
        assert torch.equal(cond_fn(torch.zeros_like(x0), t, y=LABELS), expected)
        with pytest.raises(ValueError, match="pass denoised_fn=cond_fn.denoised_fn to the loop, or model="):
            cond_fn(torch.zeros_like(x0), t, y=LABELS)


def test_the_noise_level_of_a_rescaled_timestep():
    """With T=4000, guided-diffusion gives its networks t·1000/T; unscaled it gives t itself."""
    schedule = Schedule.linear(4000)
    sigmas = schedule.respaced(4000).sigmas
    x = torch.randn(N, 3, 6, 6)
    for t, index in ((torch.full((N,), 250.25), 1001), (torch.full((N,), 1001), 1001), (torch.full((N,), 0.75), 3)):
        for low, high, guided in ((0, sigmas[index], True), (sigmas[index], math.inf, False)):
            guidance = Guidance("js", interval=(low, high))
            cond_fn = as_cond_fn(classifier(timed=True), guidance, schedule, "xt")
            assert (cond_fn(x, t, y=LABELS) != 0).any() == guided
    with pytest.raises(ValueError, match="t=4000 is timestep 4000 of the original process; schedule has 4000"):
        cond_fn(x, torch.full((N,), 4000), y=LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_classifier_gets_its_own_dtype(dtype):
    x, t = torch.randn(N, 3, 6, 6), torch.full((N,), 500)
    expected, found = (
        as_cond_fn(classifier(timed=True).to(kind), Guidance(tilt=0.5), classifier_input="xt")(x, t, y=LABELS)
        for kind in (torch.float32, dtype)
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-6)


def test_errors():
    guide = classifier()
    with pytest.raises(ValueError, match="sine_boost=0.3 adds to the step's variance, which a cond_fn does not know"):
        as_cond_fn(guide, Guidance(sine_boost=0.3))
    with pytest.raises(ValueError, match="rule='edm' belongs to FDivSampler's method='heun'"):
        as_cond_fn(guide, Guidance(rule="edm"))
    with pytest.raises(ValueError, match="classifier_input='x1' must be 'x0' or 'xt'"):
        as_cond_fn(guide, classifier_input="x1")
    with pytest.raises(ValueError, match="model and classifier_transform are for classifier_input='x0'"):
        as_cond_fn(guide, classifier_input="xt", model=unet())
    with pytest.raises(TypeError, match="guidance must be a Guidance or None, got str"):
        as_cond_fn(guide, "js")
    with pytest.raises(TypeError, match="classifier must be callable, got int"):
        as_cond_fn(3)
    with pytest.raises(ValueError, match="cond_fn needs the labels: pass model_kwargs"):
        as_cond_fn(guide)(torch.zeros(1, 3, 6, 6), torch.zeros(1).long())
