"""Which device a name means, and which names mean none."""

from __future__ import annotations

import pytest
import torch

from calguide_fast.devices import usable_device
from calguide_fast.generation.devices import own_device


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")], ids=str)
def test_a_device_by_its_name(name):
    assert usable_device(name) == torch.device("cpu")


@pytest.mark.parametrize("gpus", [0, 2])
def test_without_a_name_a_gpu_or_the_cpu(gpus, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert usable_device(None) == torch.device("cuda" if gpus else "cpu")
    # the second of two GPUs is the fourth process's own
    own = torch.device("cuda", 1) if gpus else torch.device("cpu")
    assert own_device(None) == own and taken == [own] * (gpus > 0)
    message = "device='cuda:2': PyTorch sees " + ("2 GPUs" if gpus else "no GPU") + " here"
    for choose in (usable_device, own_device):
        with pytest.raises(ValueError, match=message):
            choose("cuda:2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abacus", "device='abacus' is no device of PyTorch's: "),
        ("xpu", "device='xpu' cannot be used: [^.]*XPU[^.]*$"),
        ("hpu", "device='hpu' cannot be used: No module named 'torch.hpu'$"),
    ],
)
def test_a_name_of_no_device(name, message):
    if hasattr(torch, name) and getattr(torch, name).is_available():
        pytest.skip(f"an {name.upper()} is present")
    with pytest.raises(ValueError, match=message):
        usable_device(name)
