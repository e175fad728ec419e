"""What turns images into features: any callable."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ImageFeatures(NamedTuple):
    """What a network sees in B images."""

    features: Tensor  # [B, D], for FID and everything that counts neighbours
    spatial: Tensor | None = None  # [B, D_s], of an early layer, place by place: for sFID
    logits: Tensor | None = None  # [B, C], of a classifier: for the Inception score


# (B, C, H, W) uint8 on the device that the evaluation runs on, C and H and W as in the file
Extractor = Callable[[Tensor], Tensor | ImageFeatures]


def import_extractor(name: str) -> Extractor:
    """The callable that ``module:function`` names; the module may lie in the working folder.

    Raises:
        ImportError: there is no such module, or it raises something while it is imported.
        ValueError: the name is of another form, or names nothing that can be called.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise ValueError(f"features={name!r} must be of the form module:function")
    # a function of the user's is looked for where the command is run, as `python -m` does
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ImportError(f"features={name!r} cannot be imported: {type(error).__name__}: {error}") from error
    extractor = getattr(module, function_name, None)
    if not callable(extractor):
        raise ValueError(f"{module_name} has no function {function_name!r}, which features={name!r} names")
    return extractor


def extractor_name(extractor: Extractor, imported_as: str | None = None) -> str:
    """What the extractor calls itself, or as what it was imported, or where its function or class is: ``module:name``.

    A module may hold several objects of one class, which only the names that they were imported by tell apart. A
    ``functools.partial`` goes by its function's name and its arguments.

    Raises ValueError as :func:`source_sha256`.
    """
    if (name := _own_name(extractor) or imported_as) is not None:
        return name
    if isinstance(extractor, partial):
        return f"{extractor_name(extractor.func)}({_arguments(extractor)})"
    definition = _definition(extractor)
    return f"{definition.__module__}:{definition.__qualname__}"


def source_sha256(extractor: Extractor) -> str | None:
    """The SHA-256 of the file that holds the extractor's function or class, so that changed code is seen to be other.

    What that file imports and the weights that it loads are not looked at. None for what says by a name of its own
    what it is, and where there is no file, as of what was typed in. Of a ``functools.partial``, its function's and the
    arguments' together.

    Raises ValueError where such an argument is no plain value, and the partial has no name.
    """
    if _own_name(extractor) is not None:
        return None
    if isinstance(extractor, partial):
        function, arguments = _own_name(extractor.func) or source_sha256(extractor.func), _arguments(extractor)
        return None if function is None else hashlib.sha256(f"{function}({arguments})".encode()).hexdigest()
    try:
        file = inspect.getsourcefile(_definition(extractor))
    except (TypeError, OSError):
        return None  # it is no Python's, or a class that was typed in
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file is not None and Path(file).is_file() else None


def _own_name(extractor: Extractor) -> str | None:
    return name if isinstance(name := getattr(extractor, "name", None), str) else None


def _definition(extractor: Extractor) -> Any:
    # a decorator's function is in the decorator's file
    return inspect.unwrap(extractor) if hasattr(extractor, "__qualname__") else type(extractor)


def _arguments(extractor: partial[Any]) -> str:
    """Those that a partial was given, as they are written."""
    named = dict(sorted(extractor.keywords.items()))
    for value in (*extractor.args, *named.values()):
        if not _is_plain(value):
            raise ValueError(
                f"features is a functools.partial of {extractor_name(extractor.func)} with an argument of type "
                f"{type(value).__name__}, which does not say what it is: give the partial a name of its own, as an "
                "attribute, that changes with what it computes"
            )
    return ", ".join([*map(repr, extractor.args), *(f"{name}={value!r}" for name, value in named.items())])


def _is_plain(value: Any) -> bool:
    """Whether a value is written alike in every process: numbers, strings, and lists, tuples and dicts of them."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, complex, str, bytes)


def extract(extractor: Extractor, images: Tensor) -> ImageFeatures:
    """Features of (B, C, H, W) uint8 images.

    Raises:
        TypeError: the extractor gives neither a tensor nor ImageFeatures.
        ValueError: what it gives is not one row for every image.
    """
    with torch.no_grad():
        found = extractor(images)
    if isinstance(found, Tensor):
        found = ImageFeatures(found)
    if not isinstance(found, ImageFeatures):
        raise TypeError(f"features returned {type(found).__name__}, it must return a tensor (N, D) or ImageFeatures")
    for name, table in found._asdict().items():
        if table is not None and (table.ndim != 2 or len(table) != len(images)):
            raise ValueError(
                f"features returned {name} of shape {tuple(table.shape)} for {len(images)} images, it must be (N, D)"
            )
    return found
