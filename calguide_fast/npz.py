"""Reading .npz files: small arrays whole, large ones as a stream."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no readable .npz file: {error}") from None


def array_names(path: Path) -> list[str]:
    """The names of a file's arrays. Raises FileNotFoundError, or ValueError for another kind of file."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_array(path: Path, name: str) -> np.ndarray:
    """A whole array of a file, without running code that the file brings along.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz file, or holds no such array of numbers.
    """
    _check_holds(path, name)
    with _readable(path), np.load(path, allow_pickle=False) as arrays:
        try:
            return arrays[name]
        except ValueError as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None


class ArrayStream:
    """An array in a file, whose rows are read one group after the other.

    Args:
        path: the file.
        name: the array's name.

    Attributes:
        shape, dtype: of the array.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz file, holds no such array, or holds it in Fortran's order.
    """

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        _check_holds(path, name)
        with self._open() as file:
            self.shape, fortran_order, self.dtype = _read_header(file)
        if fortran_order:
            raise ValueError(f"{path}: {name} is stored column by column; save np.ascontiguousarray of it")

    def rows(self, size: int) -> Iterator[np.ndarray]:
        """The array in groups of at most `size` rows, of which one is in memory at a time."""
        with self._open() as file:
            _read_header(file)
            for start in range(0, self.shape[0], size):
                shape = (min(size, self.shape[0] - start), *self.shape[1:])
                data = bytearray(file.read(math.prod(shape) * self.dtype.itemsize))
                if len(data) < math.prod(shape) * self.dtype.itemsize:
                    raise ValueError(f"{self._path}: {self._name} ends before its {self.shape[0]} rows do")
                yield np.frombuffer(data, self.dtype).reshape(shape)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with _readable(self._path), zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as file:
            yield file


def _check_holds(path: Path, name: str) -> None:
    if name not in (names := array_names(path)):
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}, but no {name}")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
