"""Labelled images on disk, read batch by batch: OpenAI's .npz batches, and folders with a folder for each class."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")

ACCEPTED = (
    "an .npz file with uint8 images arr_0 (n, height, width, channels) and labels arr_1 (n,), as OpenAI's evaluator "
    "reads it, or a folder that holds a folder of pictures for each class, as ImageNet's: the folders' places in the "
    "order of their names are the labels."
)


class Batch(NamedTuple):
    """Some images and their labels."""

    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B,) int64


class LabelledImages(Protocol):
    """Images that are read anew by each call of ``batches``."""

    num_classes: int | None  # where the data say

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Batch]:
        """The images in order, `size` at a time."""


def open_images(path: str | Path, resize: int | None = None) -> LabelledImages:
    """Labelled images in what :data:`ACCEPTED` names; they are read when their batches are asked for.

    Args:
        path: a file or a folder.
        resize: bring the shorter side of every image to so many pixels (bicubic, with antialiasing) and cut the square
            in the middle.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: it holds something else, or nothing; and, while batches are read, a picture that cannot be read or
            has another size than those with it.
    """
    path = Path(path)
    if resize is not None and resize < 1:
        raise ValueError(f"resize={resize} must be a positive number of pixels")
    if path.is_dir():
        return _Folder(path, resize)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: expected {ACCEPTED}")
    if path.suffix != ".npz":
        raise ValueError(f"{path} holds no images that can be read here: expected {ACCEPTED}")
    return _Archive(path, resize)


class _Archive:
    """An .npz file, whose images are never in memory all at once."""

    num_classes: int | None = None

    def __init__(self, path: Path, resize: int | None) -> None:
        self.path, self.resize = path, resize
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = arrays.files
                labels = arrays["arr_1"] if "arr_1" in names else None
            if "arr_0" not in names or labels is None:
                raise ValueError(f"it holds {', '.join(names) or 'nothing'}")
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                shape, dtype = _header(file)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise ValueError(f"{path} holds no labelled images: {error}; expected {ACCEPTED}") from None
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape:
            raise ValueError(f"{path}: arr_0 has shape {shape} and dtype {dtype}; it must be (n, H, W, C), uint8")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: arr_1 has shape {labels.shape} and dtype {labels.dtype}; it must be ({shape[0]},), integers"
            )
        self.shape, self.labels = shape, labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Batch]:
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            for start in range(0, len(self), size):
                labels = self.labels[start : start + size]
                shape = (len(labels), *self.shape[1:])
                try:
                    pixels = file.read(int(np.prod(shape)))
                    images = np.frombuffer(pixels, np.uint8).reshape(shape)
                except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
                    raise ValueError(f"{self.path} is damaged after {start} images: {error}") from None
                if self.resize is not None:
                    images = np.stack([_square(image, self.resize) for image in images])
                yield Batch(images, labels)


class _Folder:
    """Folders of pictures, decoded to RGB."""

    def __init__(self, path: Path, resize: int | None) -> None:
        classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        self.resize = resize
        self.num_classes: int | None = len(classes)
        self.files = [
            (file, label)
            for label, folder in enumerate(classes)
            for file in sorted(folder.iterdir())
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(f"{path} holds {len(classes)} folders and no pictures in them; expected {ACCEPTED}")

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Batch]:
        # decoding leaves the interpreter to other threads
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self), size):
                chosen = self.files[start : start + size]
                files = [file for file, _ in chosen]
                images = list(pool.map(partial(_decoded, resize=self.resize), files))
                yield Batch(_stacked(files, images), np.array([label for _, label in chosen], np.int64))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy stream, which is left at its first element."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order:
        raise ValueError("arr_0 is stored by columns (Fortran order)")
    return shape, dtype


def _decoded(file: Path, resize: int | None) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            image = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file} is no readable picture: {error}") from None
    return image if resize is None else _square(image, resize)


def _square(image: np.ndarray, size: int) -> np.ndarray:
    height, width, channels = image.shape
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    # Pillow has no pictures of any other number of channels than 1 and 3, which every channel alone has
    planes = [np.asarray(Image.fromarray(image[..., c]).resize(new, Image.Resampling.BICUBIC)) for c in range(channels)]
    return np.stack(planes, -1)[top : top + size, left : left + size]


def _stacked(files: Iterable[Path], images: list[np.ndarray]) -> np.ndarray:
    for file, image in zip(files, images):
        if image.shape != images[0].shape:
            sizes = " and ".join(f"{i.shape[1]}x{i.shape[0]}" for i in (images[0], image))
            raise ValueError(f"{file} is of another size than the pictures before it, {sizes}: resize them to one")
    return np.stack(images)
