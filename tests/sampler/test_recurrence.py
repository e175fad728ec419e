"""Taking guided steps again: back to the step's noise level with fresh noise, as universal guidance and FreeDoM do."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import assert_near, literal_score
from literal import double, gradient_at, linear_alphas_cumprod
from literal_solvers import eps_denoiser, heun, karras
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance
from calguide_fast.backends.philox import RECURRENCE_STREAM
from calguide_fast.ops.noise import sampling_noise

N = 4
LABELS = torch.tensor([0, 3, 4, 1])
SEEDS = torch.tensor([7, 3, 2**40, -1])
TOLERANCE = 1e-4


def sample(sampler, method="ddpm", steps=5, **options):
    options = {"seeds": SEEDS, "progress": False, **options}
    return sampler.sample(LABELS, steps=steps, method=method, **options)


def guided(interval=None, **options) -> FDivSampler:
    return FDivSampler(unet(), classifier(), Guidance(scale=3.0, interval=interval), **options)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("interval", [None, (0.1, 5.0)])
def test_discrete_steps(interval, method, backend):
    """Algorithm 1 of Bansal et al., by the sampler's own single steps."""
    bars = [linear_alphas_cumprod()[t] for t in (0, 250, 500, 749, 999)]
    sigmas = [math.sqrt((1 - bar) / bar) for bar in bars]
    times = [3 if interval is None or interval[0] < sigma <= interval[1] else 1 for sigma in sigmas]
    noise = list(torch.randn(1 + sum(2 * n - 1 for n in times), N, 3, 6, 6))
    sampler = guided(interval)
    found = sample(sampler, method, noise=torch.stack(noise), recurrence=3)

    draws = iter(noise)
    x = next(draws)
    wide_model, wide_guide = double(unet()), double(classifier())
    x = x.double()
    for k in reversed(range(5)):
        bar, before = bars[k], bars[k - 1] if k else 1.0
        beta = 1 - bar / before
        for time in range(times[k]):
            z = next(draws).double()
            t = torch.full((N,), (0, 250, 500, 749, 999)[k])
            with torch.no_grad():
                eps, v = wide_model(x, t).chunk(2, 1)
            x0 = ((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)).clamp(-1, 1)
            pull = 3.0 * gradient_at(lambda x0: literal_score(wide_guide(x0), LABELS)[0], x0) if times[k] > 1 else 0.0
            if method == "ddim":
                eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar) - math.sqrt(1 - bar) * pull
                x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
                x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
            else:
                mean = beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * x
                smallest = beta * (1 - before) / (1 - bar)
                smallest = smallest or (1 - bars[1] / bars[0]) * (1 - bars[0]) / (1 - bars[1])
                var = torch.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(smallest))
                x = mean / (1 - bar) + var * pull + (var.sqrt() * z if k else 0.0)
            if time < times[k] - 1:
                x = math.sqrt(bar / before) * x + math.sqrt(1 - bar / before) * next(draws).double()
    assert next(draws, None) is None
    assert_near(found.images, x, TOLERANCE)
    assert (found.images - sample(sampler, method, noise=torch.stack(noise)[:6]).images).abs().max() > 50 * TOLERANCE


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_heun(churn):
    noise = torch.randn(1 + 5 * 3, N, 3, 6, 6)
    plain, wide = eps_denoiser(double(unet())), double(classifier())

    def denoised(x, sigma, guides):
        d = plain(x, sigma)
        gradient = gradient_at(lambda x0: literal_score(wide(x0), LABELS)[0], d.clamp(-1, 1))
        return (d + 3.0 * sigma**2 / math.sqrt(1 + sigma**2) * gradient).clamp(-1, 1)

    expected = heun(denoised, noise.double(), karras(5), churn=churn, repeats=2)
    assert_near(sample(guided(churn=churn), "heun", noise=noise, recurrence=2).images, expected, TOLERANCE)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun"])
def test_once_is_plain_and_the_last_time_has_the_steps_own_noise(method):
    sampler = guided(**{"ddim": {"eta": 0.5}, "heun": {"churn": 2.0}}.get(method, {}))
    plain, once, twice = (sample(sampler, method, **options) for options in ({}, {"recurrence": 1}, {"recurrence": 2}))
    assert torch.equal(plain.images, once.images) and not torch.equal(plain.images, twice.images)
    own = [sampling_noise(SEEDS, (3, 6, 6), draw) for draw in range(6)]
    more = [sampling_noise(SEEDS, (3, 6, 6), draw, RECURRENCE_STREAM) for draw in range(10)]
    noise = [own[0]] + [z for i in range(5) for z in (more[2 * i], more[2 * i + 1], own[i + 1])]
    again = sample(sampler, method, recurrence=2, noise=torch.stack(noise))
    assert torch.allclose(again.images, twice.images, atol=1e-6)


def test_images_do_not_depend_on_the_batch():
    sampler = guided(interval=(0.1, 5.0))
    whole = sample(sampler, recurrence=3).images
    assert torch.allclose(sample(sampler, recurrence=3, batch_size=3).images, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "method", "recurrence", "message"),
    [
        (guided(), "ddpm", 0, "recurrence=0 must be an integer, at least 1"),
        (guided(), "ddpm", 1.5, "recurrence=1.5 must be an integer"),
        (guided(), "dpmpp", 2, "method='dpmpp' builds on the step before"),
        (FDivSampler(unet()), "ddpm", 2, "recurrence=2 repeats guided steps, and guidance=None has none"),
    ],
)
def test_wrong_recurrence(sampler, method, recurrence, message):
    with pytest.raises(ValueError, match=message):
        sample(sampler, method, recurrence=recurrence)


def test_noise_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"must be \(steps\+1 and two for each repetition.* = \(16, 4, 3, 6, 6\)"):
        sample(guided(), noise=torch.zeros(6, N, 3, 6, 6), recurrence=2)
