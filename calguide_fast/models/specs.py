"""Networks by name and file, as a command line spells them: ``resnet101:a.pth``, ``imagenet128:classifier.pt``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import Module, load_state, misfits, read_state
from .presets import PRESETS, adm_classifier, adm_unet
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .unet import UNet

RESNETS: Mapping[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}
CLASSIFIERS = (*RESNETS, *PRESETS)


class LoadedClassifier(NamedTuple):
    """A classifier with its weights, in eval mode, on the CPU."""

    module: nn.Module
    classifier_input: str  # "x0": module(x0); "xt": module(x_t, t)
    preset: str | None  # the name in PRESETS of a noise-aware one, which knows the schedule of t; None for a ResNet


def load_classifier(spec: str, softplus_beta: float | None = None) -> LoadedClassifier:
    """The classifier that ``"NAME:PATH"`` names, with the weights in that file.

    Args:
        spec: ``"resnet50:PATH"`` (18, 34, 50, 101, 152; torchvision's keys; as many classes and input channels as the
            file has) or ``"imagenet128:PATH"``, the noise-aware ADM classifier of a name in ``PRESETS``.
        softplus_beta: of a ResNet; see `ResNet`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown name, a `softplus_beta` for a network without ReLU, and as `load_checkpoint`; if the
            weights are those of another network known here, the message names it.
    """
    name, colon, path = spec.partition(":")
    if not colon or not path or name not in CLASSIFIERS:
        raise ValueError(f"classifier={spec!r} must be NAME:PATH, with NAME one of {', '.join(CLASSIFIERS)}")
    if name in PRESETS and softplus_beta is not None:
        raise ValueError(f"softplus_beta={softplus_beta} is for ResNets, which have ReLUs to replace; {name} has none")
    state = read_state(existing_file(path))
    # meta: parameters are not drawn at random only to be replaced
    with torch.device("meta"):
        if name in PRESETS:
            module: nn.Module = adm_classifier(name)
        else:
            module = RESNETS[name](**_widths(state), softplus_beta=softplus_beta)
    module = _with_weights(module, name, state, path)
    return LoadedClassifier(module, "xt", name) if name in PRESETS else LoadedClassifier(module, "x0", None)


def load_unet(preset: str, path: str | os.PathLike[str]) -> UNet:
    """The UNet of a published ADM model, in eval mode, on the CPU, with the weights in a file.

    Args:
        preset: a name in ``PRESETS``.
        path: of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown preset, and as `load_checkpoint`; if the weights are those of another network known
            here, the message names it.
    """
    if preset == "digits":
        raise ValueError(
            "preset='digits' is of the demo, whose networks are calguide_fast.demo.checkpoints.load_unet()"
        )
    with torch.device("meta"):
        module = adm_unet(preset)
    return _with_weights(module, preset, read_state(existing_file(path)), path)


def existing_file(path: str | os.PathLike[str]) -> Path:
    """A checkpoint's path. Raises FileNotFoundError, with advice, where there is no such file."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {found}: nothing is downloaded here; fetch the weights from their publisher, and give "
            "the path of the file"
        )
    return found


def _widths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """A ResNet's classes and input channels, where its weights tell them."""
    first, last = state.get("conv1.weight"), state.get("fc.weight")
    widths = {}
    if last is not None and last.ndim == 2:
        widths["num_classes"] = len(last)
    if first is not None and first.ndim == 4:
        widths["in_channels"] = first.shape[1]
    return widths


def _with_weights(module: Module, name: str, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Module:
    if misfits(module, state):
        others = [other for other, twin in _known(state) if not misfits(twin, state)]
        if others:
            raise ValueError(
                f"{path} holds the weights of {' or '.join(others)}, not of {name}'s {_kind(module)}: give "
                "another file, or the name that fits this one"
            )
    load_state(module, state, path).eval()
    return module


def _known(state: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Module]]:
    """Every network that has a name here, without weights."""
    with torch.device("meta"):
        for name, build in RESNETS.items():
            yield f"a {name}", build(**_widths(state))
        for name in PRESETS:
            yield f"the {name} classifier", adm_classifier(name)
            yield f"the {name} UNet", adm_unet(name)


def _kind(module: nn.Module) -> str:
    return "UNet" if isinstance(module, UNet) else "classifier"
