"""Images to be evaluated, batch by batch: OpenAI's .npz, a folder of pictures, or an array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from calguide_fast.npz import ArrayStream

PIXELS = "arr_0"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

ImagesLike = str | Path | np.ndarray | Tensor


class Images(ABC):
    """A number of images: ``len(images)``, and the images themselves, batch by batch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, size: int) -> Iterator[Tensor]:
        """(B, C, H, W) uint8 on the CPU, at most `size` images each, in order."""


def open_images(source: ImagesLike) -> Images:
    """The images in `source`.

    Args:
        source: an .npz file whose ``arr_0`` is (N, H, W, 1 or 3) uint8, read as a stream; a folder of pictures, which
            are read as RGB, subfolders too, in the order of their paths; or an array (N, H, W, 1 or 3) uint8.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: pixels are not uint8.
        ValueError: the file holds no such array, the folder no picture, or the array is empty or of another shape; or
            the folder is one that ``calguide-fast sample`` wrote, whose grid is no image.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _Array(source)
    path = Path(source)
    return _Folder(path) if path.is_dir() else _Npz(path)


class _Array(Images):
    def __init__(self, pixels: np.ndarray | Tensor):
        self._pixels = pixels.numpy(force=True) if isinstance(pixels, Tensor) else pixels
        _check_pixels("an array of images", self._pixels.shape, self._pixels.dtype)

    def __len__(self) -> int:
        return len(self._pixels)

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), size):
            yield _channels_first(self._pixels[start : start + size])


class _Npz(Images):
    def __init__(self, path: Path):
        self._pixels = ArrayStream(path, PIXELS)
        _check_pixels(f"{path}: {PIXELS}", self._pixels.shape, self._pixels.dtype)

    def __len__(self) -> int:
        return self._pixels.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        return map(_channels_first, self._pixels.rows(size))


class _Folder(Images):
    def __init__(self, path: Path):
        if list(path.glob("samples_*.npz")):
            # its grid is a picture, too
            raise ValueError(f"{path} is a run's folder: give its samples_….npz, or the png folder in it")
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self._files:
            raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, size: int) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for file in self._files:
            pixels = _read_picture(file)
            # pictures of another size begin a batch of their own
            if batch and (len(batch) == size or batch[0].shape != pixels.shape):
                yield torch.stack(batch)
                batch = []
            batch.append(pixels)
        yield torch.stack(batch)


def _read_picture(file: Path) -> Tensor:
    """(3, H, W) uint8."""
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no readable picture: {error}") from None


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(np.moveaxis(pixels, -1, 1), order="C"))


def _check_pixels(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise TypeError(f"{name} has dtype {dtype}; pixels must be uint8 in 0..255")
    if len(shape) != 4 or 0 in shape or shape[-1] not in (1, 3):
        raise ValueError(f"{name} has shape {shape}; it must be (N >= 1, H, W, 1 or 3)")
