"""The device that somebody names, or the one to take where nobody does."""

from __future__ import annotations

import torch


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device that is named, or a GPU if there is one, or the CPU.

    Raises:
        ValueError: PyTorch knows no such device, or has none here.
    """
    sees_gpu = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if sees_gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={str(device)!r} is no device of PyTorch's: {error}") from None
    if found.type == "cuda":
        if not sees_gpu:
            raise ValueError(f"device={str(device)!r}: PyTorch sees no GPU here")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise ValueError(f"device={str(device)!r}: PyTorch sees {torch.cuda.device_count()} GPUs here")
        return found
    if found.type == "meta":
        raise ValueError(f"device={str(device)!r} has shapes alone, and computes nothing")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        # as of accelerators that this build of PyTorch leaves out; the first sentence says so, others list what it has
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}") from None
    return found
