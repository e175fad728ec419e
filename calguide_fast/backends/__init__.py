"""Which code computes an op: choice by device and dtype, the override, and the report of what is there.

A backend is a module with the functions of ``reference``. It is imported when first asked for; one that cannot be
loaded is remembered with its reason, which ``backend_report`` shows.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class _Spec(NamedTuple):
    devices: frozenset[str] | None  # None: any
    dtypes: frozenset[torch.dtype] | None
    preferred_on: frozenset[str]
    float64_ops: frozenset[str] = frozenset()  # ops that serve float64 beyond the dtypes


# int64: the seeds of sampling_noise
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int64})

# In order of preference. PyTorch for ROCm calls its devices "cuda", too: there the cuda module has no driver to load
# with, and triton serves.
_SPECS = {
    "cpu": _Spec(frozenset({"cpu"}), _KERNEL_DTYPES, frozenset({"cpu"}), frozenset({"smooth_ece"})),
    "cuda": _Spec(frozenset({"cuda"}), _KERNEL_DTYPES, frozenset({"cuda"}), frozenset({"smooth_ece"})),
    "triton": _Spec(frozenset({"cuda"}), _KERNEL_DTYPES, frozenset({"cuda"}), frozenset({"smooth_ece"})),
    "reference": _Spec(None, None, frozenset()),
}

_loaded: dict[str, ModuleType] = {}
_failures: dict[str, str] = {}
_defaults: dict[tuple[torch.dtype, str, str | None], ModuleType] = {}
_override: str | None = None


def choose(tensor: Tensor, op: str | None = None) -> ModuleType:
    """The backend module that serves ``tensor``'s device and dtype, or the one that an override names.

    An op that serves dtypes which others do not is named in ``op``.

    Raises:
        ValueError: the overriding backend does not serve this device or dtype.
        RuntimeError: the overriding backend cannot be loaded.
    """
    if _override is not None:
        return _overriding(tensor, op)
    # device.type makes a string each time, and is a twentieth of a small call
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type
    key = (tensor.dtype, device, op)
    backend = _defaults.get(key)
    return backend if backend is not None else _default(*key)


def plain() -> ModuleType | None:
    """The functions that read the CPU's plain tensors by themselves, if there are any and no override is in the way.

    They return None, having done nothing, where they find anything out of the ordinary: a tensor that is not plain, or
    not what the op needs. The way by checks and :func:`choose`, which also loads the backend, then serves the call or
    says what is wrong with it.
    """
    cpu = _loaded.get("cpu") if _override is None or _override == "cpu" else None
    return None if cpu is None else cpu.plain


def _default(dtype: torch.dtype, device: str, op: str | None = None) -> ModuleType:
    preferred = [
        name for name, spec in _SPECS.items() if device in spec.preferred_on and _serves(spec, dtype, device, op)
    ]
    reasons = []
    backend = None
    for name in preferred:
        loaded = _load(name)
        if loaded is None:
            reasons.append(f"the {name!r} backend is not available ({_failures[name]})")
        else:
            backend = loaded
            break
    if backend is None:
        if preferred:
            text = f"calguide_fast: {'; '.join(reasons)}; using the slow 'reference' backend"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        backend = _require("reference")
    _defaults[dtype, device, op] = backend
    return backend


def _overriding(tensor: Tensor, op: str | None) -> ModuleType:
    assert _override is not None
    if not _serves(_SPECS[_override], tensor.dtype, tensor.device.type, op):
        raise ValueError(
            f"backend {_override!r}, chosen by use_backend or CALGUIDE_BACKEND, does not serve "
            f"{tensor.dtype} tensors on {tensor.device.type!r}"
        )
    return _require(_override)


def _serves(spec: _Spec, dtype: torch.dtype, device: str, op: str | None) -> bool:
    if spec.devices is not None and device not in spec.devices:
        return False
    return spec.dtypes is None or dtype in spec.dtypes or (dtype == torch.float64 and op in spec.float64_ops)


def _load(name: str) -> ModuleType | None:
    if name not in _loaded and name not in _failures:
        # whatever stops a backend from loading (not built, wrong platform) is kept and told on demand
        try:
            _loaded[name] = importlib.import_module(f"calguide_fast.backends.{name}")
        except ImportError as error:
            # in one line, as the report and warnings have it
            _failures[name] = " ".join(str(error).split())
    return _loaded.get(name)


def _require(name: str) -> ModuleType:
    backend = _load(name)
    if backend is None:
        raise RuntimeError(f"backend {name!r} cannot be loaded: {_failures[name]}")
    return backend


def _check_name(name: str, source: str) -> str:
    if name not in _SPECS:
        raise ValueError(f"{source}={name!r} is not a backend; choose one of {', '.join(map(repr, _SPECS))}")
    return name


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Compute with the named backend, until the ``with`` block ends or for good when called as a plain function.

    Args:
        name: ``"cpu"`` (C++ kernels), ``"cuda"`` (CUDA C++ kernels), ``"triton"`` (Triton kernels, for CUDA and ROCm
            devices), ``"reference"`` (plain PyTorch, any device), or None for the choice by device.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend cannot be loaded; the message says why.
    """
    global _override
    if name is not None:
        _require(_check_name(name, "name"))
    previous, _override = _override, name
    return _restoring(previous)


@contextmanager
def _restoring(previous: str | None) -> Iterator[None]:
    global _override
    try:
        yield
    finally:
        _override = previous


class BackendStatus(NamedTuple):
    """One backend's state.

    Attributes:
        name: of the backend.
        loaded: whether it can compute.
        default_on: the devices of this machine that it is the choice on.
        detail: what it is (language, instruction set), or why it could not be loaded.
        missing: whether it could not be loaded and leaves a device of this machine without any kernels.
    """

    name: str
    loaded: bool
    default_on: tuple[str, ...]
    detail: str
    missing: bool


class BackendReport(tuple[BackendStatus, ...]):
    """The status of every backend; ``str()`` gives a table to read."""

    def __str__(self) -> str:
        lines = [f"calguide_fast backends (Python {sys.version.split()[0]}, torch {torch.__version__})"]
        for status in self:
            state = "loaded" if status.loaded else "not available"
            default = f"default on {', '.join(status.default_on)}" if status.default_on else ""
            lines.append(f"  {status.name:<10} {state:<14} {default:<15} {status.detail}".rstrip())
        if _override is not None:
            lines.append(f"  every op uses {_override!r}: chosen by use_backend or CALGUIDE_BACKEND")
        return "\n".join(lines)

    __repr__ = __str__


def backend_report() -> BackendReport:
    """Load every backend and say which are there, which is chosen where, and why any could not be loaded."""
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    # what no kernel takes falls to the reference, which comes last
    open_devices = set(devices)
    found = []
    for name, spec in _SPECS.items():
        backend = _load(name)
        default_on: tuple[str, ...] = ()
        if backend is not None:
            default_on = tuple(sorted(open_devices if name == "reference" else open_devices & spec.preferred_on))
            open_devices -= set(default_on)
        detail = _failures[name] if backend is None else getattr(backend, "describe", lambda: "plain PyTorch")()
        found.append((name, backend is not None, default_on, detail))
    bare = next(default_on for name, _, default_on, _ in found if name == "reference")
    return BackendReport(
        BackendStatus(*status, missing=not status[1] and not _SPECS[status[0]].preferred_on.isdisjoint(bare))
        for status in found
    )


if os.environ.get("CALGUIDE_BACKEND"):
    use_backend(_check_name(os.environ["CALGUIDE_BACKEND"], "CALGUIDE_BACKEND"))
