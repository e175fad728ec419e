"""What the cases say of each mutant in a library: python -m emulation.verdicts LIBRARY FIRST... prints them as JSON.

FIRST, one for each mutant, is how the names of the cases begin that are tried first: those that its fault is in.

Each mutant runs in a process of its own, as it may write where it should not.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import torch
from emulation.backend import load_backend
from emulation.cases import CASES, bits, expected_results, results, wrong

SEEDS = range(1, 5)
SECONDS = 20


def verdict(backend: ModuleType, first: str) -> str:
    """The first thing that is wrong, or nothing."""
    for name in sorted(CASES, key=lambda name: not name.startswith(first)):
        in_order = results(backend, name)
        if text := wrong(name, in_order):
            return text
        for seed in SEEDS:
            found = results(backend, name, seed)
            if bits(found) != bits(in_order):
                return f"{name}: other bits under seed {seed}. {wrong(name, found)}"
    return ""


def verdict_of_child(backend: ModuleType, first: str) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            text = verdict(backend, first)
        except RuntimeError as error:
            text = str(error)
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return text if os.WIFEXITED(status) else f"ended by signal {os.WTERMSIG(status)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    library = Path(sys.argv[1])
    backend = load_backend(library)
    mutant = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "calguide_mutant")
    for name in CASES:
        expected_results(name)
    verdicts = []
    for mutant.value, first in enumerate(sys.argv[2:]):
        verdicts.append(verdict_of_child(backend, first))
    print(json.dumps(verdicts))
