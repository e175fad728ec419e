"""setup.py as a module, for the tests of what it does."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def load() -> ModuleType:
    for requirement in ("pybind11", "ninja"):
        pytest.importorskip(requirement, reason=f"{requirement} is only needed to build, and is not installed here")
    spec = importlib.util.spec_from_file_location("calguide_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # its dataclass looks its own module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
