"""Settings: all that decides a run's images, as a table that is written, hashed and compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

Settings = Mapping[str, Any]  # of what JSON holds

# What `sample` has learned since folders were first begun, and the value that stands for what it did before. There a
# setting is left out of the table, so that no new option changes the hash of a folder that was begun without it, and
# orphans it. New settings belong here, those of guidance as "guidance.NAME"; values that stand here never change.
LATER: Mapping[str, Any] = MappingProxyType(
    {
        "classifier_weights": None,
        "recurrence": 1,
        "churn": 0.0,
        "s_tmin": 0.0,
        "s_tmax": math.inf,
        "s_noise": 1.0,
        "sigma_min": None,
        "sigma_max": None,
        "cfg_scale": 1.0,
        "null_class": None,
    }
)


def without_later(settings: Settings, prefix: str = "") -> Settings:
    """The table without what is in :data:`LATER` and at the value there."""
    return {
        name: without_later(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if prefix + name not in LATER or LATER[prefix + name] != value
    }


def settings_hash(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, which is not held in memory at once, nor read again while it is unchanged."""
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_of(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(there: Settings, here: Settings) -> list[str]:
    """What differs, one line for each setting by its name."""
    old, new = (dict(_flat(settings)) for settings in (there, here))
    found = [
        (name, *(settings.get(name, LATER.get(name)) for settings in (old, new)))
        for name in [*new, *(name for name in old if name not in new)]
    ]
    return [f"{name}: {_short(a)} there, {_short(b)} here" for name, a, b in found if a != b]


def _flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any, length: int = 60) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
