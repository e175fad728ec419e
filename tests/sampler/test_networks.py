"""Converted, compiled and frozen networks: copies that sample the same, and callers' modules left as they are."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from toys import classifier, unet

from calguide_fast import FDivSampler
from calguide_fast.models import EncoderUNet, UNet
from calguide_fast.networks import prepared

LABELS, SEEDS = torch.tensor([0, 3, 4, 1]), range(4)


def images(sampler: FDivSampler) -> torch.Tensor:
    return sampler.sample(LABELS, SEEDS, 6, progress=False).images


def state(module) -> list:
    return [(id(p), p.dtype, p.stride(), p.requires_grad, p.clone()) for p in module.parameters()]


def assert_left_alone(module, before):
    for after, old in zip(state(module), before, strict=True):
        assert after[:4] == old[:4] and torch.equal(after[4], old[4])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None], ids=str)
def test_copies_are_converted_and_the_callers_are_not(dtype, channels_last):
    model, guide, inputs = unet(), classifier(), []
    guide.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    before = state(model), state(guide)
    expected = images(FDivSampler(model, guide))
    inputs.clear()
    sampler = FDivSampler(model, guide, dtype=dtype, channels_last=channels_last)
    found = images(sampler)
    assert_left_alone(model, before[0])
    assert_left_alone(guide, before[1])
    assert found.dtype == torch.float32 and {x.dtype for x in inputs} == {dtype or torch.float32}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=layout) for x in inputs)
    assert sampler.model.first.weight.is_contiguous(memory_format=layout)
    if dtype is None and not channels_last:
        assert sampler.model is model and sampler.classifier is guide
    else:
        assert not any(p.requires_grad for net in (sampler.model, sampler.classifier) for p in net.parameters())
    if dtype in (torch.float16, torch.bfloat16):
        # the first step multiplies the model's rounding by 160, into the clip
        assert 0 < (found - expected).abs().mean() < 0.1
    else:
        assert torch.allclose(found, expected, atol=1e-4)


def test_networks_that_convert_themselves_keep_what_needs_float32():
    small = {"image_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
    options = {**small, "attention_resolutions": (2,), "num_head_channels": 32}
    model = UNet(out_channels=2, **options).eval()
    guide = EncoderUNet(out_channels=5, pool="attention", **options).eval()
    sampler = FDivSampler(model, guide, classifier_input="xt", dtype=torch.bfloat16)
    for net, original in ((sampler.model, model), (sampler.classifier, guide)):
        assert net.dtype == torch.bfloat16 and net.time_embed[0].weight.dtype == torch.float32
        assert original.dtype == torch.float32
    assert images(sampler).isfinite().all()


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator, which is not what is tested here."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def test_compiled_networks_sample_the_same(traced):
    model, guide = unet(), classifier()
    before = state(guide)
    sampler = FDivSampler(model, guide, sine_boost=0.3, compile=True)
    assert isinstance(sampler.model, torch._dynamo.OptimizedModule) and sampler.shape == (3, 6, 6)
    assert torch.allclose(images(sampler), images(FDivSampler(model, guide, sine_boost=0.3)), atol=1e-5)
    assert_left_alone(guide, before)
    # a compiled backward pass would compute every parameter's gradient, were it asked for
    assert not any(p.requires_grad for p in sampler.classifier.parameters())
    with torch.no_grad():
        guide.head.weight.mul_(2)
    assert torch.allclose(images(sampler), images(FDivSampler(model, guide, sine_boost=0.3)), atol=1e-5), "same tensors"


def test_compiled_and_converted(traced):
    converted, both = (
        FDivSampler(unet(), classifier(), dtype=torch.bfloat16, channels_last=True, compile=compiled)
        for compiled in (False, True)
    )
    assert (images(both) - images(converted)).abs().mean() < 0.05


def test_a_plain_callable_may_be_compiled_and_not_converted(traced):
    def halve(x, t):
        return x / 2

    plain, compiled = (FDivSampler(halve, shape=(3, 6, 6), compile=option) for option in (False, True))
    assert torch.allclose(images(compiled), images(plain), atol=1e-5)
    for options in ({"dtype": torch.float16}, {"channels_last": True}):
        with pytest.raises(
            TypeError, match="convert the parameters of an nn.Module, and the model is a plain callable"
        ):
            FDivSampler(halve, shape=(3, 6, 6), **options)
        with pytest.raises(TypeError, match="the classifier is a plain callable: function"):
            FDivSampler(unet(), lambda x: x, **options)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_cannot_be_copied_is_compiled_itself_and_not_converted(traced):
    """Old weight normalisation keeps a weight that is no leaf."""
    model, guide = unet(), classifier()
    torch.nn.utils.weight_norm(model.first)
    torch.nn.utils.weight_norm(guide.conv)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(guide)
    expected = images(FDivSampler(model, guide))
    guide(torch.zeros(1, 3, 6, 6))  # with a gradient
    before = state(guide)
    assert torch.allclose(images(FDivSampler(model, guide, compile=True)), expected, atol=1e-5)
    assert_left_alone(guide, before)
    for options in ({"dtype": torch.bfloat16}, {"channels_last": True, "compile": True}):
        with pytest.raises(TypeError, match="the classifier cannot be copied: ToyClassifier: Only Tensors created"):
            FDivSampler(unet(), guide, **options)


def test_wrong_dtypes():
    with pytest.raises(ValueError, match="dtype=torch.float64 must be torch.float16, torch.bfloat16 or torch.float32"):
        FDivSampler(unet(), classifier(), dtype=torch.float64)
    with pytest.raises(TypeError, match="dtype must be a torch.dtype or None, got 'half'"):
        prepared("model", unet(), "half", False, False)
