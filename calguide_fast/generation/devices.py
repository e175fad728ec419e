"""The device that a process samples on."""

from __future__ import annotations

import os
import platform
import socket

import torch


def own_device(name: str | None) -> torch.device:
    """The device that is named, or a GPU if there is one; without a number, the GPU of this process's own.

    Raises:
        ValueError: PyTorch knows no such device, or a GPU is named, and there is none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device of PyTorch's: {error}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name}: PyTorch sees no GPU here")
        if device.index is None:
            # a launcher may show each process all the GPUs of its machine, or its own alone
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> str:
    """Its machine and make, for the record."""
    make = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{socket.gethostname()}: {device} {make}"
