"""The CUDA kernels, executed on the CPU: right, and the same bits, whatever the order of blocks, warps and lanes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation import build
from emulation.backend import emulated_backend
from emulation.cases import CASES, bits, results, wrong

from calguide_fast.backends import reference

SEEDS = range(1, 7)


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_gives_the_same_right_bits(name):
    in_order = results(emulated_backend(), name)
    assert not wrong(name, in_order)
    for seed in SEEDS:
        assert bits(results(emulated_backend(), name, seed)) == bits(in_order), f"under seed {seed}"


def test_cases_reach_every_kind_of_memory():
    # the same rows and bins, in shared memory and beyond it
    for name, (_, settings) in CASES.items():
        if "beyond" in name or "in little memory" in name:
            in_shared = results(emulated_backend(), name.replace("beyond", "block").removesuffix(" in little memory"))
            assert settings and bits(results(emulated_backend(), name)) == bits(in_shared)


def test_one_launch_each():
    """But six for the smooth ECE and its gradient: each needs what all threads of the one before it have made."""
    emulator = emulated_backend().emulator
    for name in CASES:
        before = emulator["launches"]
        results(emulated_backend(), name)
        assert emulator["launches"] == before + (6 if "smooth ECE" in name else 1), name


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("normals")])
def test_noise_is_bit_equal_to_the_reference(name):
    assert bits(results(emulated_backend(), name)) == bits(CASES[name][0](reference))


@pytest.fixture
def emulator():
    settings = emulated_backend().emulator
    before = {name: settings[name] for name in ("compute_capability", "device_count", "driver_version", "shared_limit")}
    yield settings
    for name, value in before.items():
        settings[name] = value


def test_the_tensors_device_is_current_for_the_length_of_a_call(monkeypatch):
    current = [0]

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    call = emulated_backend()._on_its_device(lambda tensor, more: (current[0], more))
    for index in (1, 0):
        assert call(SimpleNamespace(device=torch.device("cuda", index)), "more") == (index, "more")
        assert current == [0]


def test_an_error_is_told_once(monkeypatch):
    backend = emulated_backend()
    with monkeypatch.context() as patch:
        patch.setattr(backend._kernels, "place", lambda tensor: (2, 0))
        with pytest.raises(RuntimeError, match="CUDA could not describe the device: .*cudaErrorInvalidDevice"):
            results(backend, "step (3, 3, 8, 8) 0")
    assert not wrong("tilt 5", results(backend, "tilt 5"))


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("driver_version", 0, "no NVIDIA driver"),
        ("driver_version", 12040, "an NVIDIA driver for CUDA 12.4, and they are built with CUDA 13.0"),
        ("device_count", 0, "no CUDA device"),
        ("compute_capability", 75, "a device of compute capability 7.5, for which no code was built"),
        ("compute_capability", 89, ""),
        ("compute_capability", 121, ""),
    ],
)
def test_why_no_kernel_can_run(emulator, setting, value, reason):
    native = emulated_backend()._kernels.native
    assert native.unavailable() == ""
    before, emulator[setting] = emulator[setting], value
    assert native.unavailable() == reason
    emulator[setting] = before
    # the question leaves no error behind for the next launch
    assert not wrong("tilt 5", results(emulated_backend(), "tilt 5"))


SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from emulation import build
from emulation.backend import load_backend
from emulation.cases import CASES, results, wrong
torch.set_num_threads(1)
backend = load_backend(build.cuda_module(sanitize=True))
for name in CASES:
    print(name, flush=True)
    print(wrong(name, results(backend, name, 1)))
print("all", len(CASES))
"""


def test_sanitizers_find_nothing():
    tests = Path(build.__file__).parents[1]
    environment = build.sanitizer_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SANITIZED, str(tests)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr
    *lines, last = result.stdout.splitlines()
    assert last == f"all {len(CASES)}" and not any(lines[1::2]), result.stdout
