"""from_diffusers: FDivSampler draws what diffusers' own schedulers draw from a UNet2DModel with the same noise."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from formulas import assert_near

from calguide_fast import FDivSampler, Guidance
from calguide_fast.models import as_denoiser, from_diffusers
from calguide_fast.schedule import Schedule

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (it is a part of the dev extra)")

N, STEPS = 3, 5
LABELS = torch.tensor([0, 3, 4])
# x̂₀ at the noisiest step multiplies a rounding of 1e-7 by 160
TOLERANCE = 1e-4


def unet(num_classes: int | None = None, **options):
    torch.manual_seed(4)
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options = {"sample_size": 8, "num_class_embeds": num_classes, **small, **blocks, **options}
    return diffusers.UNet2DModel(**options).eval()


CASES = [
    ("linear", "epsilon"),
    ("squaredcos_cap_v2", "epsilon"),
    ("scaled_linear", "v_prediction"),
    ("squaredcos_cap_v2", "v_prediction"),
    ("linear", "sample"),
]


def compared(monkeypatch, kind, scheduler_options, num_classes, step_options, **sampler_options):
    """The sampler's images, and those of the pipelines' loop with diffusers' scheduler, in float64."""
    net, noise = unet(num_classes), torch.randn(STEPS + 1, N, 3, 8, 8)
    scheduler = kind(**scheduler_options)
    model = from_diffusers(net, scheduler)
    sampler = FDivSampler(model, guidance=None, **sampler_options)
    method = "ddim" if kind is diffusers.DDIMScheduler else "ddpm"
    found = sampler.sample(LABELS, range(N), f"ddim{STEPS}", method, noise=noise, progress=False).images

    wide, draws = copy.deepcopy(net).double(), iter(noise.double())
    x = next(draws)
    for module in ("scheduling_ddpm", "scheduling_ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: next(draws))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = wide(x, t, class_labels=None if num_classes is None else LABELS).sample
        x = scheduler.step(output, t, x, **step_options).prev_sample
    return found, x


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize(("variance", "clip", "num_classes"), [("fixed_small", True, None), ("fixed_large", False, 5)])
def test_ddpm(variance, clip, num_classes, schedule, prediction, monkeypatch):
    options = {"beta_schedule": schedule, "prediction_type": prediction, "variance_type": variance, "clip_sample": clip}
    found, expected = compared(
        monkeypatch, diffusers.DDPMScheduler, options, num_classes, {}, variance=variance, clip_denoised=clip
    )
    assert_near(found, expected, TOLERANCE, size=None if clip else expected.abs().max())


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize(("eta", "clip", "num_classes"), [(0.0, True, 5), (0.7, False, None)])
def test_ddim(eta, clip, num_classes, schedule, prediction, monkeypatch):
    options = {"beta_schedule": schedule, "prediction_type": prediction, "clip_sample": clip}
    step_options = {"eta": eta, "use_clipped_model_output": True}
    found, expected = compared(
        monkeypatch, diffusers.DDIMScheduler, options, num_classes, step_options, eta=eta, clip_denoised=clip
    )
    assert_near(found, expected, TOLERANCE, size=None if clip else expected.abs().max())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_between_timesteps_the_denoiser_is_the_predictions_own(prediction):
    """D = x/(1+σ²) − σ v/√(1+σ²), or the sample itself, at a σ between two of the schedule's."""
    net, scheduler = unet(), diffusers.DDPMScheduler(prediction_type=prediction)
    denoiser = as_denoiser(from_diffusers(net, scheduler))
    x, sigma = torch.randn(N, 3, 8, 8), torch.tensor([0.1, 1.234, 30.0])
    level = sigma[:, None, None, None]
    output = net(x / (1 + level**2).sqrt(), denoiser.sigma_to_t(sigma)).sample
    expected = output if prediction == "sample" else x / (1 + level**2) - level * output / (1 + level**2).sqrt()
    assert_near(denoiser(x, sigma), expected, 1e-4)


def test_what_the_sampler_reads_off():
    model = from_diffusers(unet(5), diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    sampler = FDivSampler(model)
    assert sampler.shape == (3, 8, 8) and sampler.class_conditional and sampler.num_classes == 5
    assert sampler.schedule is model.schedule and model.schedule.num_timesteps == 1000
    assert abs(model.schedule.alphas_cumprod - Schedule.cosine().alphas_cumprod).max() < 1e-5
    plain = from_diffusers(unet(sample_size=(8, 16)))
    assert FDivSampler(plain).shape == (3, 8, 16) and not FDivSampler(plain).class_conditional
    assert abs(plain.schedule.alphas_cumprod - Schedule.linear().alphas_cumprod).max() < 1e-12
    net = unet().train()
    assert from_diffusers(net).training and net.training
    with pytest.raises(ValueError, match="the model is in training mode"):
        FDivSampler(from_diffusers(net))


def test_guided_and_in_half_precision():
    """The network is copied and cast, the arithmetic around it stays float32."""
    net = unet(5)
    model = from_diffusers(net, diffusers.DDPMScheduler(prediction_type="v_prediction"))

    def classifier(x0):
        return torch.stack([(k + 1) * x0[:, k % 3].mean((1, 2)) for k in range(5)], 1)

    def images(guidance=None, **options):
        sampler = FDivSampler(model, classifier if guidance else None, guidance, **options)
        return sampler.sample(LABELS, range(N), 5, progress=False).images

    plain = images()
    assert (images(Guidance("js", scale=50.0)) - plain).abs().max() > 0.05
    half = FDivSampler(model, guidance=None, dtype=torch.bfloat16)
    assert half.model.unet.dtype == torch.bfloat16 and net.dtype == torch.float32
    x_t, t = torch.randn(N, 3, 8, 8), torch.full((N,), 999)
    assert half.model(x_t, t, LABELS).dtype == torch.float32
    assert (half.sample(LABELS, range(N), 5, progress=False).images - plain).abs().mean() < 0.05


def test_errors():
    with pytest.raises(TypeError, match="unet must be a diffusers UNet2DModel, got Linear"):
        from_diffusers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="unet has out_channels=6 for in_channels=3; they must be the same: a learned"):
        from_diffusers(unet(out_channels=6))
    with pytest.raises(ValueError, match="unet has class_embed_type='timestep'; it must be None"):
        from_diffusers(unet(class_embed_type="timestep"))
    with pytest.raises(TypeError, match="scheduler must have alphas_cumprod.*; got FlowMatchEulerDiscreteScheduler"):
        from_diffusers(unet(), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="scheduler ends in pure noise"):
        from_diffusers(unet(), diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="scheduler has prediction_type='flow'; it must be one of epsilon, v_pred"):
        from_diffusers(
            unet(), SimpleNamespace(alphas_cumprod=torch.tensor([0.5]), config=SimpleNamespace(prediction_type="flow"))
        )
