"""Images from files, folders and arrays."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from calguide_fast.evaluation.images import open_images

PIXELS = np.random.RandomState(0).randint(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def everything(images, size):
    batches = list(images.batches(size))
    assert all(batch.dtype == torch.uint8 and len(batch) <= size for batch in batches)
    return torch.cat(batches).movedim(1, -1).numpy()


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_as_numpy_reads_it(size, save, tmp_path):
    save(tmp_path / "a.npz", PIXELS, np.arange(11))
    images = open_images(tmp_path / "a.npz")
    assert len(images) == 11
    for _ in range(2):  # it can be read again
        np.testing.assert_array_equal(everything(images, size), PIXELS)


@pytest.mark.parametrize("array", [PIXELS, torch.from_numpy(PIXELS), PIXELS[::-1, ..., :1]])
def test_arrays(array):
    np.testing.assert_array_equal(everything(open_images(array), 4), np.asarray(array))


def test_a_folder_is_read_as_rgb_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[1]).save(tmp_path / "b" / "a.bmp")
    Image.fromarray(PIXELS[2, ..., 0]).save(tmp_path / "c.PNG")  # grey
    Image.fromarray(np.dstack([PIXELS[3], PIXELS[3, ..., :1]])).save(tmp_path / "d.png")  # with alpha
    (tmp_path / "notes.txt").write_text("no picture")
    images = open_images(str(tmp_path))
    expected = [PIXELS[0], PIXELS[1], PIXELS[2, ..., :1].repeat(3, axis=-1), PIXELS[3]]
    assert len(images) == 4
    np.testing.assert_array_equal(everything(images, 3), expected)


def test_pictures_of_several_sizes_come_in_batches_of_one_size(tmp_path):
    for index, side in enumerate((4, 4, 4, 5, 5, 4)):
        Image.new("RGB", (side, 6)).save(tmp_path / f"{index}.png")
    batches = [tuple(batch.shape) for batch in open_images(tmp_path).batches(2)]
    assert batches == [(2, 3, 6, 4), (1, 3, 6, 4), (2, 3, 6, 5), (1, 3, 6, 4)]


def test_a_large_file_is_not_read_into_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((400, 64, 64, 3), dtype=np.uint8))
    images = open_images(tmp_path / "a.npz")
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in images.batches(8)) == 400
        assert tracemalloc.get_traced_memory()[1] < 1e6  # of 4.9 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"images": PIXELS}, ValueError, "a.npz holds images, but no arr_0"),
        ({"arr_0": PIXELS.astype(np.float32)}, TypeError, "arr_0 has dtype float32; pixels must be uint8"),
        ({"arr_0": PIXELS[..., :2]}, ValueError, r"arr_0 has shape \(11, 6, 5, 2\)"),
        ({"arr_0": PIXELS[:0]}, ValueError, r"arr_0 has shape \(0, 6, 5, 3\)"),
        ({"arr_0": np.asfortranarray(PIXELS)}, ValueError, "arr_0 is stored column by column"),
        ({"arr_0": np.array([{}])}, TypeError, "arr_0 has dtype object"),
    ],
)
def test_unusable_arrays_are_named(arrays, error, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(error, match=message):
        open_images(tmp_path / "a.npz")


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        open_images(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_images(tmp_path)
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(ValueError, match="a.npz is no readable .npz file"):
        open_images(tmp_path / "a.npz")
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="a.png is no readable picture"):
        list(open_images(tmp_path).batches(4))
    (tmp_path / "samples_1x8x8x1.npz").touch()
    with pytest.raises(ValueError, match="is a run's folder: give its samples"):
        open_images(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.find(PIXELS[9].tobytes())
    content[at] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="a.npz is no readable .npz file: Bad CRC"):
        list(open_images(tmp_path / "a.npz").batches(4))
