"""The CUDA backend over emulated kernels: the same Python, with CPU tensors for the GPU's."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from emulation import build

import calguide_fast
from calguide_fast import backends

BACKEND = Path(backends.__file__).parent / "cuda.py"


def load_backend(library: Path) -> ModuleType:
    """calguide_fast.backends.cuda anew, on the extension module at `library`, whose settings are its `emulator`."""
    extension = build.load_module(library)
    spec = importlib.util.spec_from_file_location("calguide_fast.backends.emulated_cuda", BACKEND)
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, {"calguide_fast._cuda": extension}),
        mock.patch.object(calguide_fast, "_cuda", extension, create=True),
        mock.patch.object(torch.version, "cuda", "13.0"),
    ):
        spec.loader.exec_module(module)
    module._kernels.place = lambda tensor: (0, 0)
    for name in (
        "guidance_gradient",
        "tilt_weights",
        "predict_x0",
        "guided_step",
        "philox_normal",
        "top_label",
        "top_label_backward",
        "smooth_ece",
        "smooth_ece_gradient",
    ):
        # there is no device to make the current one
        setattr(module, name, getattr(module, name).__wrapped__)
    module.emulator = build.Emulator(library)
    return module


@functools.cache
def emulated_backend() -> ModuleType:
    return load_backend(build.cuda_module())


def serve_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `use_backend("cuda")` compute CPU tensors by emulation."""
    kernel_dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int64})
    spec = backends._Spec(frozenset({"cpu"}), kernel_dtypes, frozenset(), frozenset({"smooth_ece"}))
    monkeypatch.setitem(backends._SPECS, "cuda", spec)
    monkeypatch.setitem(backends._loaded, "cuda", emulated_backend())
