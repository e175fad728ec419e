"""What a finished run leaves: one .npz as OpenAI's evaluator reads it, a grid, and, if wanted, a tree of PNGs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from calguide_fast.generation.atomic import named, replacing
from calguide_fast.generation.plan import Plan
from calguide_fast.generation.shards import Shards
from calguide_fast.samples import image_grid

GRID_PIXELS = 64  # small images are shown about as large


def write_outputs(folder: Path, plan: Plan, shards: Shards, grid: int, png: bool, check: Callable[[], None]) -> Path:
    """Write ``samples_NxHxWxC.npz``, ``grid.png`` and, if `png`, ``png/CLASS/INDEX.png``.

    One shard is in memory at a time, and the grid.

    Args:
        folder: of the run.
        plan, shards: what was sampled, all of it.
        grid: how many of the first images the grid shows; 0 for no grid.
        png: whether to write every image by itself, too.
        check: called at every shard; what it raises ends the work, and leaves no half a file but in the tree.

    Returns:
        The .npz file, which holds what :meth:`calguide_fast.Samples.save_npz` would write.

    Raises:
        DamagedShard: a shard is not what was written.
        OSError: something cannot be written; the file is named.
    """
    recorded = shards.recorded()
    shown: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for batch in range(plan.num_batches):
            check()
            pixels = shards.read(batch, recorded.get(batch, set()))
            images = plan.images(batch)
            shown.append(pixels[: max(grid - images.start, 0)].copy())
            if png:
                _write_pngs(folder / "png", pixels, plan.labels[images].tolist(), images.start)
            yield pixels

    shape = (len(plan), *shards.read(0, recorded.get(0, set())).shape[1:])
    path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with _array(archive, "arr_0", shape, np.dtype(np.uint8)) as stream:
            for pixels in batches():
                stream.write(pixels.tobytes())
        small = {"arr_1": plan.labels.numpy(), "seeds": plan.seeds.numpy(), "batch_size": np.array(plan.batch_size)}
        for name, array in small.items():
            with _array(archive, name, array.shape, array.dtype) as stream:
                stream.write(array.tobytes())
    if grid:
        picture = image_grid(torch.from_numpy(np.concatenate(shown)), zoom=max(1, GRID_PIXELS // shape[1]))
        with replacing(folder / "grid.png") as file:
            picture.save(file, format="PNG")
    return path


@contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: Sequence[int], dtype: np.dtype) -> Iterator[IO[bytes]]:
    """A stream for the elements of an array, in C order, as a member of an .npz."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream


def _write_pngs(folder: Path, pixels: np.ndarray, labels: Sequence[int], start: int) -> None:
    for index, (image, label) in enumerate(zip(pixels, labels), start):
        path = folder / f"{label:04d}" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)
        except OSError as error:
            raise named(error, path) from error
