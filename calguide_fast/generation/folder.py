"""A run's folder: made, or found again and checked, by one process before any samples."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calguide_fast.generation import atomic
from calguide_fast.generation.settings import Settings, differences, settings_hash

CONFIG = "config.json"
SHARED_SECONDS = 30.0  # until what one machine writes is seen on another
# what a run is made with, and each of its processes; it decides no more than how sums are rounded
VERSIONS = ("calguide_fast", "torch", "numpy", "python")
OF_PROCESSES = ("backend", "threads")


def open_folder(
    folder: Path, settings: Settings, this_run: dict[str, Any], resume: bool, say: Callable[[str], None]
) -> None:
    """Make the folder and its config.json, or see that the folder is of a run with the same settings.

    Args:
        folder: of the run.
        settings: what must agree.
        this_run: what config.json keeps of every run that worked in the folder, agreeing or not: versions, processes.
        resume: whether the folder may be of an earlier run.
        say: told where versions, backends or threads are not those of the first run.

    Raises:
        ValueError: the folder holds something and `resume` is not given; or it holds no run, or one with other
            settings, which are named.
        OSError: the folder cannot be made or written.
    """
    # of the folders above it, too, any may be a file
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"out={folder} must be a folder, and {place} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    # a run that was killed before it had written its config.json has begun nothing
    if any(not path.match(f"{CONFIG}.*{atomic.SUFFIX}") for path in folder.iterdir()):
        if not resume:
            raise ValueError(f"{folder} is not empty: give --resume to finish what is there, or another folder")
        config = read_config(folder)
        found = differences(config["settings"], settings)
        if found:
            raise ValueError(f"{folder} was begun with other settings:\n  " + "\n  ".join(found))
        runs = config["runs"]
        if changed := _changes_of_rounding(runs[0], this_run):
            say(f"{folder} was begun with what may round otherwise: {'; '.join(changed)}")
    # what a killed run left half-written
    for partial in (*folder.glob(f"*{atomic.SUFFIX}"), *folder.glob(f"shards/*{atomic.SUFFIX}")):
        partial.unlink()
    config = {"settings": settings, "settings_sha256": settings_hash(settings), "runs": [*runs, this_run]}
    atomic.write_bytes(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    (folder / "shards").mkdir(exist_ok=True)


def see_folder(folder: Path, settings: Settings, check: Callable[[], None]) -> None:
    """Wait until this process, too, sees the folder that rank 0 has opened, calling `check` meanwhile.

    Raises:
        ValueError: it does not, half a minute later.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while not ((folder / CONFIG).exists() and read_config(folder)["settings_sha256"] == settings_hash(settings)):
        check()
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder} on {socket.gethostname()} is not the folder that rank 0 opened: machines that share a run "
                "need a file system that they share"
            )
        time.sleep(0.1)


def _changes_of_rounding(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    tables = [{name: run[name] for name in VERSIONS} for run in (there, here)]
    # a folder may be older than the record of processes
    if "processes" in there:
        for run, table in zip((there, here), tables):
            spoken = [process for process in run["processes"] if process is not None]
            table |= {name: sorted({process[name] for process in spoken}) for name in OF_PROCESSES}
    return differences(*tables)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds. Raises ValueError if there is none, or it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG} of an earlier run, so there is nothing to resume")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(config, dict) or {"settings", "settings_sha256", "runs"} - set(config):
        raise ValueError(f"{path} is not of an earlier run")
    return config
