"""ResNets: torchvision's keys and sizes, one block restated, Softplus, and the gradient that guidance takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calguide_fast.models import resnet18, resnet34, resnet50, resnet101, resnet152
from calguide_fast.models.resnet import BasicBlock, Bottleneck

FAMILY = {
    resnet18: ((2, 2, 2, 2), 2, 11_689_512),
    resnet34: ((3, 4, 6, 3), 2, 21_797_672),
    resnet50: ((3, 4, 6, 3), 3, 25_557_032),
    resnet101: ((3, 4, 23, 3), 3, 44_549_160),
    resnet152: ((3, 8, 36, 3), 3, 60_192_808),
}


def torchvision_keys(depths, convs):
    def norm(name):
        entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{entry}" for entry in entries]

    keys = ["conv1.weight", *norm("bn1")]
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            block = f"layer{stage}.{i}"
            for j in range(1, convs + 1):
                keys += [f"{block}.conv{j}.weight", *norm(f"{block}.bn{j}")]
            # the first stage widens only where a block puts out more than the stem's 64 channels
            if i == 0 and (stage > 1 or convs == 3):
                keys += [f"{block}.downsample.0.weight", *norm(f"{block}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("build", FAMILY, ids=lambda build: build.__name__)
def test_keys_and_number_of_parameters(build):
    depths, convs, count = FAMILY[build]
    with torch.device("meta"):
        model = build()
    assert list(model.state_dict()) == torchvision_keys(depths, convs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_strides_and_shapes():
    with torch.device("meta"):
        model = resnet50()
    assert model.layer2[0].conv1.stride == (1, 1)
    assert model.layer2[0].conv2.stride == (2, 2)
    assert model.layer2[0].downsample[0].stride == (2, 2)
    assert model.layer1[0].conv2.stride == (1, 1)
    assert model.layer3[0].conv2.weight.shape == (256, 256, 3, 3)
    assert model.fc.weight.shape == (1000, 2048)


def randomise(module):
    """Spread weights and running statistics, so that nothing is hidden behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            fan_in = value[0].numel() if value.ndim > 1 else 1
            value.copy_((noise - 0.5) * (12 / fan_in) ** 0.5 if value.ndim > 1 else 0.5 + noise)
    return module.eval()


def restated(block, x, activation):
    """The block in functional form, from its state dict: normalise, then scale and shift."""
    w = block.state_dict()

    def conv(h, name, stride=1):
        kernel = w[f"{name}.weight"]
        return F.conv2d(h, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(h, name):
        mean, var, weight, bias = (
            w[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    identity = norm(conv(x, "downsample.0", stride=2), "downsample.1")
    if isinstance(block, Bottleneck):
        h = activation(norm(conv(x, "conv1"), "bn1"))
        h = activation(norm(conv(h, "conv2", stride=2), "bn2"))
        h = norm(conv(h, "conv3"), "bn3")
    else:
        h = activation(norm(conv(x, "conv1", stride=2), "bn1"))
        h = norm(conv(h, "conv2"), "bn2")
    return activation(h + identity)


@pytest.mark.parametrize("beta", [None, 3.0])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_block_restated(kind, beta):
    block = randomise(kind(10, 6, 2, beta).double())
    x = torch.randn(2, 10, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activation = F.relu if beta is None else lambda h: torch.log1p(torch.exp(beta * h)) / beta
    torch.testing.assert_close(block(x), restated(block, x, activation), rtol=1e-7, atol=1e-7)


def test_whole_network_restated():
    model = randomise(resnet18(num_classes=5).double())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = F.max_pool2d(F.relu(model.bn1(F.conv2d(x, model.conv1.weight, stride=2, padding=3))), 3, stride=2, padding=1)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            h = block(h)
    torch.testing.assert_close(model(x), h.mean(dim=(2, 3)) @ model.fc.weight.T + model.fc.bias)


def test_initialisation_is_torchvisions():
    torch.manual_seed(0)
    model = resnet18(num_classes=7, in_channels=1)
    weight = model.layer3[1].conv2.weight  # fan-out 256·9
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert model.conv1.weight.shape[1] == 1
    assert model.num_classes == model.fc.out_features == 7


def test_softplus_replaces_every_relu_and_keeps_the_keys():
    smooth, plain = resnet50(softplus_beta=3.0), resnet50()
    activations = [module for module in smooth.modules() if isinstance(module, nn.Softplus)]
    assert len(activations) == 1 + 16
    assert all(module.beta == 3.0 and module.threshold == 20 for module in activations)
    assert not any(isinstance(module, nn.ReLU) for module in smooth.modules())
    assert list(smooth.state_dict()) == list(plain.state_dict())


def test_sharp_softplus_approaches_relu():
    plain = resnet18(num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    errors = []
    with torch.no_grad():
        for beta in (3.0, 30.0, 1e4):
            smooth = resnet18(num_classes=5, softplus_beta=beta).eval()
            smooth.load_state_dict(plain.state_dict())
            errors.append(float((smooth(x) - plain(x)).abs().max() / plain(x).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("beta", [None, 3.0])
def test_gradient_with_respect_to_the_input(beta):
    model = randomise(resnet18(num_classes=4, softplus_beta=beta).double()).requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(image):
        return model(image).log_softmax(dim=1)[:, 1].sum()

    (gradient,) = torch.autograd.grad(score(x), x)
    h = 1e-7
    with torch.no_grad():
        slope = (score(x + h * direction) - score(x - h * direction)) / (2 * h)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [None, 3.0])
def test_channels_last_equals_contiguous(beta):
    model = resnet50(num_classes=4, softplus_beta=beta).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision_is_close(dtype, tolerance):
    torch.manual_seed(0)
    model = resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(dtype)(x.to(dtype))
    assert actual.dtype is dtype
    assert (actual.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_bad_softplus_beta(beta):
    with pytest.raises(ValueError, match="softplus_beta must be None or a positive number"):
        resnet18(softplus_beta=beta)


def test_bad_input():
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(2, 1, 32, 32\)"):
        resnet18(num_classes=2)(torch.zeros(2, 1, 32, 32))
