"""ADM networks against figures of guided-diffusion's own models, and the properties that a sampler leans on.

`golden/adm.json` holds what openai/guided-diffusion computes (fp32, CPU) with the weights, inputs and loss weights that
`deterministic` and `fill` define: per case a digest of the state-dict keys and shapes, the output and the gradient of
sum(weights * output) with respect to the input.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calguide_fast.models import PRESETS, EncoderUNet, UNet, adm_classifier, adm_unet
from calguide_fast.models.blocks import (
    AttentionBlock,
    AttentionPool2d,
    GroupNorm32,
    ResBlock,
    doubled,
    timestep_embedding,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "adm.json").read_text())
CASES = GOLDEN["cases"]
TOLERANCE = 3e-5  # of an element's rms; the two implementations differ by rounding only

TINY = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}
TIMESTEPS = torch.tensor([3, 741])


def deterministic(shape, salt):
    """Exactly reproducible numbers in [-1, 1), from a hash of the running index in 32-bit arithmetic."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    hashed = (i * i + np.uint64(3) * i + np.uint64(977 * salt + 1)) * np.uint64(2654435761) % np.uint64(2**32)
    return torch.from_numpy(hashed.astype(np.float64) / 2**31 - 1).reshape(shape)


def fill(model):
    """Give every weight unit gain and every vector a spread, zero-initialised ones included."""
    state = model.state_dict()
    for salt, key in enumerate(sorted(state)):
        weight = state[key]
        u = deterministic(weight.shape, salt)
        if weight.ndim > 1:
            weight.copy_(u * (3 / weight[0].numel()) ** 0.5)
        else:
            weight.copy_(0.3 * u + (1.0 if key.endswith("weight") else 0.0))
    return model.eval()


def images(dtype=torch.float32):
    return deterministic((2, 3, 8, 8), 1000).to(dtype)


def digest(module):
    lines = "\n".join(f"{key} {tuple(value.shape)}" for key, value in module.state_dict().items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def build(case):
    return fill((UNet if case["kind"] == "unet" else EncoderUNet)(**case["kwargs"]))


def arguments(case):
    timesteps = torch.tensor(case.get("timesteps", TIMESTEPS.tolist()))
    return (timesteps, torch.tensor(case["labels"])) if "labels" in case else (timesteps,)


def assert_golden(tensor, facts):
    assert list(tensor.shape) == facts["shape"]
    flat = tensor.detach().double().flatten()
    rms = facts["norm"] / flat.numel() ** 0.5
    picked = flat[torch.linspace(0, flat.numel() - 1, 8).round().long()]
    torch.testing.assert_close(picked / rms, torch.tensor(facts["values"]).double() / rms, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(float(flat.norm()), facts["norm"], rtol=TOLERANCE, atol=0)


def relative_error(actual, expected):
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_guided_diffusion(name):
    case = CASES[name]
    model = build(case)
    assert digest(model) == case["state_dict"]
    x = images().requires_grad_(True)
    output = model(x, *arguments(case))
    assert_golden(output, case["output"])
    loss_weights = deterministic(output.shape, 2000).float()
    (gradient,) = torch.autograd.grad((output * loss_weights).sum(), x)
    assert_golden(gradient, case["input_gradient"])


@pytest.mark.parametrize("name", CASES)
def test_channels_last_equals_contiguous(name):
    case = CASES[name]
    model, x = build(case), images()
    with torch.no_grad():
        expected = model(x, *arguments(case))
        model.to(memory_format=torch.channels_last)
        actual = model(x.to(memory_format=torch.channels_last), *arguments(case))
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("resblock_updown", [False, True])
@pytest.mark.parametrize("conv_resample", [False, True])
def test_channels_last_is_kept_through_the_blocks(resblock_updown, conv_resample):
    options = {"resblock_updown": resblock_updown, "conv_resample": conv_resample, "use_scale_shift_norm": True}
    model = fill(UNet(**TINY, **options)).to(memory_format=torch.channels_last)
    seen = []

    def record(module, _, output):
        seen.append((type(module).__name__, output.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        if isinstance(module, (ResBlock, AttentionBlock, GroupNorm32, nn.Conv2d)):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(images().to(memory_format=torch.channels_last), TIMESTEPS)
    assert len(seen) > 20
    assert all(kept for _, kept in seen), seen


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize(
    "name",
    [
        "unet-legacy-scale_shift-updown-conv",
        "unet-new-sum-plain-conv",
        "encoder-attention",
        "encoder-spatial",
    ],
)
def test_half_precision_torso_is_close(name, dtype, tolerance):
    case = CASES[name]
    model = build(case)
    with torch.no_grad():
        expected = model(images(), *arguments(case))
        assert model.convert_dtype(dtype) is model
        actual = model(images(), *arguments(case))
    assert model.dtype is dtype
    assert actual.dtype is torch.float32
    assert 0 < relative_error(actual, expected) < tolerance


def test_half_precision_casts_the_torso_convolutions_only():
    model = UNet(**TINY, use_fp16=True)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            assert module.weight.dtype is (torch.float32 if name == "out.2" else torch.float16), name
        elif isinstance(module, (nn.Linear, nn.GroupNorm)):
            assert module.weight.dtype is torch.float32, name
    model.convert_to_fp32()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.convert_to_fp16()
    assert model.dtype is torch.float16


def test_float64_is_kept():
    model = build(CASES["unet-new-scale_shift-updown-conv"])
    with torch.no_grad():
        single = model(images(), TIMESTEPS)
        double = model.double()(images(torch.float64), TIMESTEPS)
    assert double.dtype is torch.float64
    assert relative_error(single, double) < TOLERANCE


def test_half_precision_classifier_gives_a_gradient():
    case = CASES["encoder-attention-new-scale_shift-updown"]
    model = build(case).requires_grad_(False)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        x = images().requires_grad_(True)
        log_prob = model.convert_dtype(dtype)(x, TIMESTEPS).log_softmax(dim=1)[:, 2]
        gradients.append(torch.autograd.grad(log_prob.sum(), x)[0])
    assert gradients[1].dtype is torch.float32
    assert nn.functional.cosine_similarity(gradients[0].flatten(1), gradients[1].flatten(1)).min() > 0.99


@pytest.mark.parametrize("kind", [UNet, EncoderUNet])
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for use_checkpoint in (False, True):
        model = fill(kind(**TINY, use_checkpoint=use_checkpoint)).train()
        model(images(), TIMESTEPS).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_untrained_unet_predicts_zero():
    # the output convolution starts at zero
    assert not UNet(**TINY)(images(), TIMESTEPS).any()


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = fill(UNet(**TINY, dropout=0.5))
    assert torch.equal(model(images(), TIMESTEPS), model(images(), TIMESTEPS))
    model.train()
    assert not torch.equal(model(images(), TIMESTEPS), model(images(), TIMESTEPS))


@pytest.mark.parametrize("height, width", [(4, 4), (8, 12)])
def test_other_image_sizes(height, width):
    x = deterministic((2, 3, height, width), 1).float()
    assert fill(UNet(**TINY))(x, TIMESTEPS).shape == (2, 6, height, width)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("height, width", [(3, 5), (1, 4), (8, 8)])
def test_doubling_is_that_of_the_nearest_neighbours(dtype, memory_format, height, width):
    x = deterministic((2, 3, height, width), 7).to(dtype).to(memory_format=memory_format)
    x[0, 0, 0, 0], x[1, 2, -1, -1] = torch.nan, -0.0
    with torch.no_grad():
        found = doubled(x)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), expected.signbit())
    assert found.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(doubled(x.requires_grad_()).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 4.0))


def test_timestep_embedding():
    timesteps = torch.tensor([0.0, 1.0, 250.5])
    embedding = timestep_embedding(timesteps, 7)
    angles = timesteps[:, None].double() * torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]).double()
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(embedding.double(), expected, rtol=0, atol=3e-5)
    assert torch.equal(timestep_embedding(torch.tensor([5]), 8), timestep_embedding(torch.tensor([5.0]), 8))


def test_what_a_sampler_reads():
    unet = UNet(**TINY, num_classes=5)
    assert (unet.image_size, unet.in_channels, unet.out_channels, unet.num_classes) == (8, 3, 6, 5)
    assert unet.class_conditional is True
    assert UNet(**TINY).class_conditional is False
    assert UNet(**TINY).num_classes is None
    assert EncoderUNet(**TINY).num_classes == 6


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_keys_and_shapes(preset):
    with torch.device("meta"):
        assert digest(adm_unet(preset)) == GOLDEN["presets"][preset]["unet"]
        assert digest(adm_classifier(preset)) == GOLDEN["presets"][preset]["classifier"]


@pytest.mark.parametrize(
    "build_preset, preset, millions",
    [
        (adm_unet, "imagenet64", 295.9),
        (adm_unet, "imagenet128", 421.5),
        (adm_unet, "imagenet256", 553.8),
        (adm_classifier, "imagenet128", 42.6),
    ],
)
def test_presets_have_the_published_number_of_parameters(build_preset, preset, millions):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_preset(preset).parameters())
    assert round(count / 1e6, 1) == millions


def test_presets_carry_the_facts_of_diffusion():
    assert {name: preset.schedule for name, preset in PRESETS.items() if preset.schedule != "linear"} == {
        "imagenet64": "cosine"
    }
    assert {name: preset.classifier_scale for name, preset in PRESETS.items()} == {
        "imagenet64": 1.0,
        "imagenet128": 0.5,
        "imagenet256": 1.0,
        "imagenet256_uncond": 10.0,
        "imagenet512": 4.0,
    }
    for preset in PRESETS.values():
        assert preset.learned_variance == (preset.unet["out_channels"] == 2 * preset.unet["in_channels"])
        assert preset.diffusion_steps == 1000


def test_preset_head_orders():
    # the orders have the same keys and shapes: only this tells them apart before sampling does
    with torch.device("meta"):
        new = {name: adm_unet(name).middle_block[1].use_new_attention_order for name in PRESETS}
        heads = {name: adm_unet(name).middle_block[1].num_heads for name in PRESETS}
    assert new == {name: name == "imagenet64" for name in PRESETS}
    assert heads == {
        "imagenet64": 12,
        "imagenet128": 4,
        "imagenet256": 16,
        "imagenet256_uncond": 16,
        "imagenet512": 16,
    }


def test_preset_overrides():
    with torch.device("meta"):
        model = adm_unet("imagenet64", num_classes=1001, use_fp16=True)
    assert model.num_classes == 1001
    assert model.dtype is torch.float16


@pytest.mark.parametrize("build_preset", [adm_unet, adm_classifier])
def test_unknown_preset(build_preset):
    with pytest.raises(ValueError, match=r"imagenet64, imagenet128.*got 'imagenet32'"):
        build_preset("imagenet32")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (UNet, {"dims": 3}, "dims must be 2"),
        (UNet, {"model_channels": 48}, "multiple of 32"),
        (UNet, {"channel_mult": ()}, "multiple of 32"),
        (UNet, {"num_head_channels": 24}, "num_head_channels must divide the 64 .* got 24"),
        (UNet, {"num_head_channels": -1, "num_heads": 3}, "num_heads must divide the 64 .* got 3"),
        (UNet, {"num_head_channels": 0}, "num_head_channels must divide"),
        (EncoderUNet, {"pool": "max"}, "adaptive, attention, spatial, spatial_v2, got 'max'"),
        (EncoderUNet, {"pool": "attention", "num_head_channels": -1}, "needs num_head_channels"),
    ],
)
def test_constructor_errors(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{**TINY, **options})


def test_group_norm_error():
    with pytest.raises(ValueError, match="divisible by 32 .* got 40"):
        GroupNorm32(40)


def test_forward_errors():
    plain, conditional = UNet(**TINY), UNet(**TINY, num_classes=5)
    x, labels = images(), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="y is missing"):
        conditional(x, TIMESTEPS)
    with pytest.raises(ValueError, match="y was given"):
        plain(x, TIMESTEPS, labels)
    with pytest.raises(ValueError, match=r"y must be .* got torch.float32"):
        conditional(x, TIMESTEPS, labels.float())
    with pytest.raises(ValueError, match=r"y must be .* shape \(2,\).*\(1,\)"):
        conditional(x, TIMESTEPS, labels[:1])
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(2, 2, 8, 8\)"):
        plain(x[:, :2], TIMESTEPS)
    with pytest.raises(ValueError, match="divisible by 2, got 7x8"):
        plain(x[:, :, :7], TIMESTEPS)
    with pytest.raises(ValueError, match=r"timesteps must have shape \(2,\), got \(1,\)"):
        EncoderUNet(**TINY)(x, TIMESTEPS[:1])
    with pytest.raises(ValueError, match="dtype must be"):
        plain.convert_dtype(torch.int8)


def test_attention_pooling_wants_the_image_size():
    classifier = EncoderUNet(**TINY, pool="attention")
    with pytest.raises(ValueError, match="built for 16 positions, got a feature map of 2x2"):
        classifier(images()[:, :, :4, :4], TIMESTEPS)


@pytest.mark.parametrize("size", [1, 5])
def test_attention_pooling_is_the_first_row_of_full_attention(size):
    torch.manual_seed(0)
    pool = AttentionPool2d(size, 12, 4, 5).double()
    x = torch.randn(2, 12, size, size, dtype=torch.float64)
    tokens = torch.cat([x.flatten(2).mean(dim=2, keepdim=True), x.flatten(2)], dim=2) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens).reshape(2, 3, 3, 4, -1).unbind(1)
    weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / 2, dim=-1)
    expected = pool.c_proj(torch.einsum("bhts,bhcs->bhct", weights, v).flatten(1, 2))[:, :, 0]
    torch.testing.assert_close(pool(x), expected)
