"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place, on the disk itself, when the block ends; after an error, nothing does.

    Raises:
        OSError: it cannot be written, as on a full disk; `path` is named.
    """
    # of one process alone, so that a run that was believed dead does no harm
    partial = path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}")
    try:
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        # a failed write does not say of which file; an error of another file, which the block met, does
        if error.filename is None or Path(error.filename) == partial:
            raise named(error, path) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file at once, as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to the end, on the disk itself. After a crash the last line may be cut off; the next begins anew."""
    try:
        with path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from error


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries, such as a new name, on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def named(error: OSError, path: Path) -> OSError:
    """The error, saying of which file it speaks."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return OSError(error.errno, error.strerror, str(path))
