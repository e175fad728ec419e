"""Loading weights from a file, without running code that the file brings along."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")
PARALLEL_PREFIX = "module."
SHOWN = 5
AGAIN = "Was it copied or downloaded whole?"

Module = TypeVar("Module", bound=nn.Module)


def load_checkpoint(module: Module, path: str | os.PathLike[str], strict: bool = True) -> Module:
    """Load the weights in `path` into `module`, in place, and return it.

    The file is a safetensors file (`.safetensors`) or anything else that `torch.load(weights_only=True)` reads. Weights
    under a "state_dict" or "model" entry, or with a "module." prefix, are found; they are cast to the dtypes of the
    module, and go to its device. A module built on the meta device gets the file's tensors themselves, on the CPU.

    Args:
        module: the network.
        path: the file.
        strict: whether the file's keys must be exactly the module's. Shapes must agree either way.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no state dict, needs code to be run, or does not fit the module; the
            message names some of the keys and shapes that do not fit.
    """
    return load_state(module, read_state(path), path, strict)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file by their names, unwrapped, on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, but for what depends on the module.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _state_dict(_read(path), path)


def load_state(
    module: Module, state: Mapping[str, Tensor], path: str | os.PathLike[str], strict: bool = True
) -> Module:
    """Load weights that were read from `path`; the rest is as in `load_checkpoint`."""
    own = module.state_dict()
    state = _with_counters(own, state)
    found = _compare(own, state)
    to_meta = any(value.is_meta for value in own.values())
    if found.misshapen or (strict and (found.missing or found.unexpected)) or (to_meta and found.missing):
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: {found.described(own, state)}. {found.remedy()}"
        )
    weights = {key: value.to(own[key].dtype) for key, value in state.items() if key in own}
    module.load_state_dict(weights, strict=strict, assign=to_meta)
    return module


def misfits(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether these weights lack some of the module's, have others, or have them in another shape."""
    own = module.state_dict()
    return any(_compare(own, _with_counters(own, state)))


class _Differences(NamedTuple):
    """Keys in which weights differ from a module's own."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def described(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
        problems = [
            _some("missing", [f"{key} {tuple(own[key].shape)}" for key in self.missing]),
            _some("unexpected", [f"{key} {tuple(state[key].shape)}" for key in self.unexpected]),
            _some(
                "of another shape",
                [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in self.misshapen],
            ),
        ]
        return "; ".join(filter(None, problems))

    def remedy(self) -> str:
        if not self.missing and not self.misshapen:
            return "All others fit: save the state dict without these, and load that file"
        return "Give a file of the same architecture, size and number of classes"


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> _Differences:
    return _Differences(
        missing=[key for key in own if key not in state],
        unexpected=[key for key in state if key not in own],
        misshapen=[key for key in own if key in state and state[key].shape != own[key].shape],
    )


def _with_counters(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a counter of training steps where a file older than it has none; inference never reads it."""
    counters = {
        key: torch.zeros((), dtype=value.dtype) if value.is_meta else value
        for key, value in own.items()
        if key.endswith("num_batches_tracked")
    }
    return {**counters, **state}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}. {AGAIN}") from error
    # opened first, so that a file one may not read is not taken for a damaged one
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} was refused: it is damaged, or reading it would run code that it brings along. If you trust "
                "it, save its state_dict() alone, with torch.save or as safetensors, and load that file"
            ) from error
        except (RuntimeError, EOFError, OSError) as error:
            # what follows the first sentence is general advice
            what = str(error).partition(". ")[0].rstrip(".")
            raise ValueError(f"{path} is not a readable checkpoint: {what}. {AGAIN}") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    named_tensors = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )
    if not named_tensors or not content:
        raise ValueError(
            f"{path} holds no state dict: expected names and tensors, at the top or under "
            + " or ".join(repr(wrapper) for wrapper in WRAPPERS)
        )
    if all(key.startswith(PARALLEL_PREFIX) for key in content):
        return {key.removeprefix(PARALLEL_PREFIX): value for key, value in content.items()}
    return dict(content)


def _some(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:SHOWN])}{more}"
