"""Networks by name and file: what loads, and what a wrong name or file is told."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from calguide_fast.models import (
    adm_classifier,
    adm_unet,
    load_classifier,
    load_unet,
    resnet18,
    resnet50,
    specs,
)


def stretched(module):
    """Weights of the right shapes that take no memory and no room in a file: one number each, strides of 0."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in module.state_dict().items()}


def on_meta(build, *arguments, **keywords):
    with torch.device("meta"):
        return build(*arguments, **keywords)


@pytest.fixture
def save(tmp_path):
    def run(state, name="weights.pt"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return run


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_resnet_has_the_classes_and_channels_of_its_file(suffix, tmp_path):
    source = resnet18(num_classes=7, in_channels=1).eval()
    path = tmp_path / f"weights.{suffix}"
    save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(source.state_dict(), path)
    module, classifier_input, preset = load_classifier(f"resnet18:{path}")
    assert (classifier_input, preset, module.training) == ("x0", None, False)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(module(x), source(x))
    smooth = load_classifier(f"resnet18:{path}", softplus_beta=3.0).module
    assert smooth.relu.beta == 3.0 and not torch.equal(smooth(x), source(x))
    torch.autograd.grad(smooth(x).sum(), list(smooth.parameters()))


@pytest.mark.parametrize("preset", ["imagenet64", "imagenet512"])
def test_a_published_classifier_is_noise_aware(preset, save):
    path = save(stretched(on_meta(adm_classifier, preset)))
    module, classifier_input, found = load_classifier(f"{preset}:{path}")
    assert (classifier_input, found, module.training) == ("xt", preset, False)
    assert not any(value.is_meta for value in module.state_dict().values())


@pytest.mark.parametrize("preset", ["imagenet64", "imagenet256_uncond"])
def test_a_published_unet(preset, save):
    module = load_unet(preset, str(save(stretched(on_meta(adm_unet, preset)))))
    assert not module.training and not any(value.is_meta for value in module.state_dict().values())


@pytest.mark.full
def test_the_largest_network_of_128_pixels_in_full(tmp_path):
    """421.5 million parameters through a file and back, and one evaluation of them."""
    torch.manual_seed(0)
    source = adm_unet("imagenet128").eval()
    save_file(source.state_dict(), tmp_path / "unet.safetensors")
    module = load_unet("imagenet128", tmp_path / "unet.safetensors")
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(421.5e6, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), source.parameters()))
    with torch.no_grad():
        out = module(torch.randn(1, 3, 128, 128), torch.tensor([500]), torch.tensor([207]))
    assert out.shape == (1, 6, 128, 128) and out.isfinite().all()


@pytest.mark.parametrize("spec", ["", "resnet50", "resnet50:", "resnet20:a.pt", ":a.pt", "imagenet100:a.pt"])
def test_a_wrong_spec_is_told_what_is_allowed(spec):
    with pytest.raises(ValueError, match=r"must be NAME:PATH, with NAME one of resnet18, .*resnet152, imagenet64") as e:
        load_classifier(spec)
    assert repr(spec) in str(e.value)


def test_a_wrong_setting(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of imagenet64.*got 'imagenet100'"):
        load_unet("imagenet100", tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the demo, whose networks are calguide_fast.demo.checkpoints.load_unet\(\)"):
        load_unet("digits", tmp_path / "a.pt")
    with pytest.raises(ValueError, match="softplus_beta=3.0 is for ResNets.*imagenet64 has none"):
        load_classifier("imagenet64:a.pt", softplus_beta=3.0)


@pytest.mark.parametrize(
    "load", [lambda path: load_classifier(f"resnet50:{path}"), lambda p: load_unet("imagenet64", p)]
)
def test_a_missing_file(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*no\.pt: nothing is downloaded.*give the path"):
        load(tmp_path / "no.pt")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_truncated_file(name, tmp_path):
    state, whole = resnet18(num_classes=2).state_dict(), tmp_path / f"whole{name}"
    save_file(state, whole) if name.endswith("safetensors") else torch.save(state, whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[: -(1 << 20)])
    with pytest.raises(ValueError, match=rf"{name} is not a readable.*downloaded whole\?"):
        load_classifier(f"resnet18:{tmp_path / name}")


def test_a_pickle_that_needs_code(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(specs.load_unet, protocol=2))
    with pytest.raises(ValueError, match=r"a.pt was refused.*save its state_dict\(\) alone"):
        load_classifier(f"resnet18:{tmp_path / 'a.pt'}")


@pytest.mark.parametrize(
    ("build", "spec", "message"),
    [
        ((resnet18,), "resnet50:{}", "holds the weights of a resnet18, not of resnet50's classifier"),
        ((adm_classifier, "imagenet128"), "imagenet64:{}", "of the imagenet128 classifier, not of imagenet64's"),
        ((adm_unet, "imagenet64"), "imagenet64:{}", "of the imagenet64 UNet, not of imagenet64's classifier"),
        ((adm_classifier, "imagenet256"), "resnet50:{}", "the imagenet256 classifier or the imagenet256_uncond class"),
        ((adm_unet, "imagenet256_uncond"), None, "of the imagenet256_uncond UNet, not of imagenet256's UNet"),
        ((resnet50,), None, "of a resnet50, not of imagenet256's UNet"),
    ],
)
def test_the_weights_of_another_network_are_recognised(build, spec, message, save):
    path = save(stretched(on_meta(*build)))
    with pytest.raises(ValueError, match=message):
        load_unet("imagenet256", path) if spec is None else load_classifier(spec.format(path))


def test_missing_and_extra_keys_are_named(save):
    state = stretched(on_meta(resnet18))
    del state["bn1.weight"]
    state["head.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"1 missing: bn1.weight \(64,\); 1 unexpected: head.weight.*same architecture"
    ):
        load_classifier(f"resnet18:{save(state)}")
    # what is only too much has a remedy of its own
    state["bn1.weight"] = torch.zeros(64)
    with pytest.raises(
        ValueError, match=r"1 unexpected: head.weight \(3,\). All others fit: save the state dict without"
    ):
        load_classifier(f"resnet18:{save(state)}")
