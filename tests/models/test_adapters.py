"""Denoisers of EDM and k-diffusion as ε-models, and back: exact relations, and samples that must agree."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from formulas import assert_near
from torch import nn

from calguide_fast import FDivSampler
from calguide_fast.demo.checkpoints import load_unet
from calguide_fast.models import as_denoiser, from_edm, from_k_diffusion
from calguide_fast.schedule import Schedule

N, CLASSES = 4, 5
LABELS = torch.tensor([0, 3, 4, 1])
SCHEDULES = ["linear", "cosine"]


class Raw(nn.Module):
    """F(x, c_noise, one-hot labels): a network before its preconditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.noise, self.label = nn.Linear(1, 8), nn.Linear(CLASSES, 8)

    def forward(self, x, c_noise, labels):
        h = self.first(x) + self.noise(torch.tanh(c_noise.flatten()[:, None] / 500))[..., None, None]
        return self.last(torch.tanh(h + self.label(labels)[..., None, None]))


class Preconditioned(nn.Module):
    """The interface of EDM's networks, which take σ as it comes: (B,), and labels one-hot or None."""

    img_resolution, img_channels, label_dim = 6, 3, CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.model = Raw()

    def forward(self, x, sigma, class_labels=None, shift=0.0):
        assert sigma.shape == x.shape[:1] and sigma.dtype == torch.float32
        labels = x.new_zeros(len(x), CLASSES) if class_labels is None else class_labels
        assert labels.shape == (len(x), CLASSES) and labels.dtype == torch.float32
        c_skip, c_out, c_in, c_noise = self.scalings(sigma[:, None, None, None])
        return c_skip * x + c_out * self.model(c_in * x, c_noise, labels) + shift


class EDMPrecond(Preconditioned):
    """Karras et al., table 1, last column."""

    sigma_min, sigma_max, sigma_data = 0, float("inf"), 0.5

    def scalings(self, sigma):
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class VPPrecond(Preconditioned):
    """Its first column: σ² = exp(½ β_d t² + β_min t) − 1, and c_noise the timestep (M−1)·t of the original DDPM."""

    beta_d, beta_min = 19.9, 0.1
    sigma_min, sigma_max = 0.0100, 152.0

    def scalings(self, sigma):
        time = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return 1.0, -sigma, 1 / (1 + sigma**2).sqrt(), 999 * time


def network(kind=EDMPrecond):
    torch.manual_seed(3)
    return kind().eval()


def k_denoiser(kind=EDMPrecond):
    """The same, as k-diffusion calls it."""
    net = network(kind)

    def denoiser(x, sigma, class_cond=None, **extra):
        labels = None if class_cond is None else torch.nn.functional.one_hot(class_cond, CLASSES + 1)[:, :CLASSES]
        return net(x, sigma, None if labels is None else labels.float(), **extra)

    return denoiser


MODELS = {
    "edm": lambda schedule="linear", kind=EDMPrecond: from_edm(network(kind), schedule),
    "k-diffusion": lambda schedule="linear", kind=EDMPrecond: from_k_diffusion(
        k_denoiser(kind), schedule, image_size=6, in_channels=3, num_classes=CLASSES
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_preconditioned_eps_model_is_found_again(name):
    """VPPrecond's D is x − σ F(x/√(1+σ²), …): what the adapter makes of it must be F itself."""
    model, schedule = MODELS[name](kind=VPPrecond), Schedule.linear()
    x_t = torch.randn(N, 3, 6, 6)
    onehot = torch.eye(CLASSES)[LABELS]
    for t in (0, 37, 500, 999):
        sigma = 1 / schedule.alphas_cumprod[t] - 1
        time = (math.sqrt(0.01 + 2 * 19.9 * math.log(1 + sigma)) - 0.1) / 19.9
        expected = network(VPPrecond).model.double()(
            x_t.double(), torch.full((N,), 999 * time).double(), onehot.double()
        )
        found = model(x_t, torch.full((N,), t), y=LABELS)
        # (x − D)/σ loses what x has in front of σ F, and that is much at the smallest σ alone
        assert_near(found, expected, 2e-4 if t == 0 else 1e-5, f"eps at {t}")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [EDMPrecond, VPPrecond])
@pytest.mark.parametrize("name", MODELS)
def test_denoising_and_the_way_back(name, kind, schedule):
    """denoise is the network; as_denoiser of the ε-model is the network too, wherever the schedule reaches."""
    model, net = MODELS[name](schedule, kind), network(kind)
    x, onehot = torch.randn(N, 3, 6, 6), torch.eye(CLASSES)[LABELS]
    back = as_denoiser(model)
    assert not back.training and back.sigma_min == pytest.approx(model.schedule.respaced(1000).sigmas[0])
    for sigma in (0.05, 0.3, 1.0, 7.7, 60.0):
        expected = net(sigma * x, torch.full((N,), sigma), onehot)
        assert torch.equal(model.denoise(sigma * x, sigma, LABELS), expected)
        assert torch.equal(model.denoise(sigma * x, torch.full((N,), sigma), y=LABELS), expected)
        # D = x − σ ε̂ is a difference of numbers of σ's size
        assert_near(back(sigma * x, torch.full((N,), sigma), y=LABELS), expected, 1e-6 * (1 + sigma))
    half = model.denoise(x.half(), 1.0, LABELS)
    assert half.dtype == torch.float32, "an image that a sampler divides by σ is not kept in half precision"


def test_gaussian_data_is_denoised_exactly():
    """For data of variance s², D = s²x/(s²+σ²), and ε̂ = √(1−ᾱ) x_t/(ᾱ s² + 1 − ᾱ)."""
    model = from_k_diffusion(lambda x, sigma: x * 0.25 / (0.25 + sigma[:, None, None, None] ** 2), "cosine")
    x_t, t = torch.randn(N, 1, 4, 4), torch.tensor([0, 20, 500, 999])
    bar = torch.from_numpy(model.schedule.alphas_cumprod)[t][:, None, None, None]
    # at the smallest σ the difference x − D keeps 1e-7/σ
    assert_near(model(x_t, t), (1 - bar).sqrt() * x_t / (0.25 * bar + 1 - bar), 3e-5)


def test_labels_are_one_hot_and_the_null_class_is_none():
    net = network()
    model = from_edm(net)
    assert model.class_conditional and model.num_classes == CLASSES
    x, sigma = torch.randn(N, 3, 6, 6), torch.full((N,), 2.0)
    assert torch.equal(model.denoise(x, sigma, torch.full((N,), CLASSES)), net(x, sigma))
    assert torch.equal(model.denoise(x, sigma), net(x, sigma))
    assert torch.equal(model.denoise(x, sigma, LABELS, shift=1.0), net(x, sigma, torch.eye(CLASSES)[LABELS], shift=1.0))
    guided = FDivSampler(model, guidance=None, cfg_scale=2.0, null_class=CLASSES)
    assert guided.num_classes == CLASSES and guided.shape == (3, 6, 6)
    assert guided.sample(LABELS, range(N), 3, progress=False).images.isfinite().all()
    unconditional = from_edm(net, label_dim=0)
    assert not unconditional.class_conditional
    with pytest.raises(ValueError, match="y was given, and the network is unconditional"):
        unconditional.denoise(x, sigma, LABELS)


def test_the_sampler_reads_the_schedule_off():
    model = MODELS["edm"](schedule="cosine")
    assert FDivSampler(model, guidance=None).schedule is model.schedule
    assert FDivSampler(model, guidance=None, schedule="linear").schedule is not model.schedule


@pytest.mark.parametrize("name", MODELS)
def test_ddim_is_euler_on_the_denoiser(name):
    """Song et al.: with η=0 and no clip, DDIM is Euler's method in EDM's scaling, dx/dσ = (x − D)/σ."""
    model, noise = MODELS[name](kind=VPPrecond), torch.randn(9, N, 3, 6, 6)
    sampler = FDivSampler(model, guidance=None, clip_denoised=False)
    found = sampler.sample(LABELS, range(N), "8", "ddim", noise=noise, progress=False).images
    wide, sigmas = as_denoiser(model), [*model.schedule.respaced("8").sigmas[::-1], 0.0]
    x = noise[0].double() * math.sqrt(1 + sigmas[0] ** 2)
    for sigma, following in zip(sigmas, sigmas[1:]):
        denoised = wide(x.float(), torch.full((N,), sigma).float(), y=LABELS).double()
        x = x + (following - sigma) * (x - denoised) / sigma
    assert_near(found, x, 1e-4, size=x.abs().max())


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_eps_model_as_k_diffusion_calls_it(schedule, quantize):
    """D = x − σ ε̂(x/√(1+σ²), t), t linear in log σ between timesteps, and v left out."""
    seen = []

    def model(x, t, y):
        assert y is LABELS
        seen.append(t)
        return torch.cat([torch.tanh(x) + t.float()[:, None, None, None] / 1000, x], 1)

    denoiser = as_denoiser(model, schedule, quantize=quantize)
    sigmas = Schedule.of(schedule).respaced(1000).sigmas
    assert (denoiser.sigma_min, denoiser.sigma_max) == (sigmas[0], sigmas[-1])
    # the ends, beyond them, on a timestep and between two
    sigma = np.array([1e-4, sigmas[0], sigmas[500], 0.7 * sigmas[321] + 0.3 * sigmas[322], sigmas[-1], 1e9])
    x = torch.randn(6, 3, 6, 6) * torch.from_numpy(sigma).clamp(max=200).float()[:, None, None, None]
    found = denoiser(x, torch.from_numpy(sigma).float(), y=LABELS)
    expected_t = np.interp(np.log(sigma), np.log(sigmas), np.arange(1000))
    (t,) = seen
    assert t.dtype == (torch.int64 if quantize else torch.float32)
    expected_t = np.round(expected_t) if quantize else expected_t
    assert_near(t.double(), torch.from_numpy(expected_t), 1e-4, "t")
    level, time = (torch.from_numpy(v)[:, None, None, None] for v in (sigma, expected_t))
    eps = torch.tanh(x / (1 + level**2).sqrt()) + time / 1000
    assert_near(found[:5], (x - level * eps)[:5], 2e-4)
    inside = slice(1, 5)
    ratio = denoiser.t_to_sigma(t).double() / torch.from_numpy(sigma)
    assert_near(ratio[inside], torch.ones(4).double(), 0.02 if quantize else 1e-5)
    whole = torch.arange(1000)
    assert_near(denoiser.t_to_sigma(whole), torch.from_numpy(sigmas), 1e-6)
    assert_near(denoiser.t_to_sigma(whole.float()), torch.from_numpy(sigmas), 1e-5)
    assert torch.equal(denoiser.t_to_sigma(torch.tensor([-1.0, 2e3])), denoiser.t_to_sigma(torch.tensor([0.0, 999.0])))


def test_noise_levels_are_narrowed_to_the_networks():
    assert (from_edm(network()).sigma_min, from_edm(network()).sigma_max) == (0.002, 80.0)
    vp = from_edm(network(VPPrecond), sigma_max=500.0)
    assert (vp.sigma_min, vp.sigma_max) == (0.01, 152.0)
    denoiser = as_denoiser(lambda x, t: x, "cosine")
    again = from_k_diffusion(denoiser)
    assert (again.sigma_min, again.sigma_max) == (denoiser.sigma_min, denoiser.sigma_max)
    plain = from_k_diffusion(lambda x, sigma: x)
    assert (plain.sigma_min, plain.sigma_max) == (0.01, 80.0)


def test_modules_are_left_as_they_are_and_copies_are_their_own():
    net = network().train()
    net.model.first.eval()
    model = from_edm(net)
    assert model.training and net.training and not net.model.first.training
    with pytest.raises(ValueError, match="the model is in training mode"):
        FDivSampler(model, guidance=None)
    assert not from_edm(net.eval()).training
    x_t, t = torch.randn(N, 3, 6, 6), torch.full((N,), 999)
    copied = copy.deepcopy(model.eval())
    with torch.no_grad():
        net.model.last.weight.zero_()
    assert not torch.equal(copied(x_t, t, LABELS), model(x_t, t, LABELS))
    assert torch.equal(copied.half()._levels.sigma(t), model._levels.sigma(t)), "noise levels stay float32"


def test_noise_levels_follow_their_input_to_its_device():
    levels = from_edm(network())._levels
    t = torch.tensor([0, 500])
    before = levels.sigma(t)
    assert levels.sigma(t.to("meta")).device.type == levels.timestep(before.to("meta")).device.type == "meta"
    assert torch.equal(levels.sigma(t), before)


def test_compiled():
    torch._dynamo.reset()
    x, t, sigma = torch.randn(N, 3, 6, 6), torch.full((N,), 321), torch.full((N,), 2.0)
    model = from_edm(network())
    for module, second in ((model, t), (as_denoiser(model), sigma)):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_near(compiled(x, second, y=LABELS), module(x, second, y=LABELS), 1e-6)


def test_errors():
    with pytest.raises(TypeError, match="the network must be callable, got int"):
        from_edm(3)
    for adapter in (from_edm, from_k_diffusion):
        with pytest.raises(TypeError, match=r"must be a denoiser net\(x, sigma\), and this package's UNet takes no"):
            adapter(load_unet())
    with pytest.raises(TypeError, match="model must be callable, got int"):
        as_denoiser(3, "linear")
    with pytest.raises(ValueError, match="sigma_min=90.0 and sigma_max=80.0 must be 0 < sigma_min < sigma_max"):
        from_edm(network(), sigma_min=90.0)
    with pytest.raises(ValueError, match="label_dim=-1 must be 0 or more"):
        from_edm(network(), label_dim=-1)
    with pytest.raises(ValueError, match="schedule must be given: the model has none of its own"):
        as_denoiser(lambda x, t: x)
    with pytest.raises(ValueError, match="schedule must have at least two timesteps"):
        as_denoiser(lambda x, t: x, [0.5])
