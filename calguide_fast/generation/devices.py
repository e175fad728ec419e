"""The device that a process samples on, and what it computes with there."""

from __future__ import annotations

import os
import platform
import socket
from typing import Any

import torch

from calguide_fast import backends
from calguide_fast.devices import usable_device


def own_device(name: str | None) -> torch.device:
    """The device that is named, or a GPU if there is one; without a number, the GPU of this process's own.

    Raises ValueError as :func:`usable_device`.
    """
    device = usable_device(name)
    if device.type == "cuda":
        if device.index is None:
            # a launcher may show each process all the GPUs of its machine, or its own alone
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What this process computes with, for the record: machine, device, the ops' backend and the CPU's threads."""
    backend = backends.choose(torch.empty(0, device=device))
    return {
        "machine": socket.gethostname(),
        "device": str(device),
        "make": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "backend": backend.__name__.rpartition(".")[2],
        "threads": torch.get_num_threads(),
    }
