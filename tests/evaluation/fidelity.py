"""torch-fidelity for the tests, and a random Inception in a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn


def import_torch_fidelity() -> types.ModuleType:
    """torch-fidelity, which imports torchvision for data sets and resizing that no test here touches.

    Where torchvision is missing, as for some builds of PyTorch, an empty stand-in takes its place.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed (it is the evaluate extra)")
    if importlib.util.find_spec("torchvision") is not None or "torch_fidelity" in sys.modules:
        return importlib.import_module("torch_fidelity")
    names = ["torchvision", *(f"torchvision.{name}" for name in ("datasets", "transforms", "transforms.functional"))]
    modules = {name: _Empty(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        return importlib.import_module("torch_fidelity")
    finally:
        for name in names:
            del sys.modules[name]


class _Empty(types.ModuleType):
    """A package in which every name is a class without contents."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write_random_inception(path: Path) -> Path:
    """Weights of Inception's shapes, drawn so that signals keep their size from layer to layer."""
    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *args, **keywords: {}),
        mock.patch.object(network, "load_state_dict", lambda *args: None),
    ):
        net = network("random", ["2048"])
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
    return path
