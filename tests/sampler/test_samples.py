"""Samples: the pixels, the file that OpenAI's evaluator reads, the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from calguide_fast import Samples


def make(count: int = 3, channels: int = 3, height: int = 4, width: int = 5) -> Samples:
    images = torch.rand(count, channels, height, width) * 2.4 - 1.2
    return Samples(images, torch.arange(count), torch.arange(count) - 1, batch_size=2)


def test_pixels_are_those_of_openais_samplers():
    images = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0]).reshape(1, 1, 2, 4)
    pixels = Samples(images, torch.zeros(1), torch.zeros(1), 1).to_uint8()
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 2, 4, 1)
    # (x + 1)·127.5, clipped and truncated
    assert pixels.flatten().tolist() == [0, 0, 63, 127, 191, 254, 255, 255]
    samples = make()
    assert torch.equal(samples.to_uint8()[1, :, :, 2], ((samples.images[1, 2] + 1) * 127.5).clamp(0, 255).byte())


def test_npz_is_what_the_evaluator_reads(tmp_path):
    samples = make()
    path = samples.save_npz(tmp_path)
    assert path == tmp_path / "samples_3x4x5x3.npz"
    with np.load(path) as file:
        # the evaluator takes arr_0 by name, and checks that it is uint8 NHWC
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (3, 4, 5, 3)
        assert (file["arr_0"] == samples.to_uint8().numpy()).all()
        assert file["arr_1"].tolist() == [0, 1, 2]
        assert file["seeds"].tolist() == [-1, 0, 1] and file["batch_size"] == 2


def test_npz_keeps_the_name_it_is_given(tmp_path):
    assert make().save_npz(tmp_path / "mine.npz") == tmp_path / "mine.npz"
    assert make().save_npz(str(tmp_path / "no_suffix")).name == "no_suffix"
    assert (tmp_path / "no_suffix").exists()
    with pytest.raises(FileNotFoundError):
        make().save_npz(tmp_path / "missing" / "mine.npz")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(3, None, (2, 2)), (3, 3, (1, 3)), (5, 2, (3, 2)), (1, None, (1, 1))]
)
def test_grid_is_pixel_exact(count, columns, shape, channels, tmp_path):
    samples = make(count, channels)
    picture = np.asarray(Image.open(samples.save_grid(tmp_path / "grid.png", columns)))
    picture = picture.reshape(*picture.shape[:2], channels)
    rows, columns = shape
    # a gap of one pixel between the images, none around them
    assert picture.shape == (rows * 5 - 1, columns * 6 - 1, channels)
    covered = np.zeros(picture.shape[:2], dtype=bool)
    for index, pixels in enumerate(samples.to_uint8().numpy()):
        top, left = index // columns * 5, index % columns * 6
        assert (picture[top : top + 4, left : left + 5] == pixels).all()
        covered[top : top + 4, left : left + 5] = True
    assert (picture[~covered] == 255).all()


def test_grid_zooms_by_whole_pixels(tmp_path):
    samples = make(2)
    plain = np.asarray(Image.open(samples.save_grid(tmp_path / "a.png")))
    large = np.asarray(Image.open(samples.save_grid(tmp_path / "b.png", zoom=3)))
    assert (large == plain.repeat(3, 0).repeat(3, 1)).all()


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (make(0), {}, r"a grid needs images of shape \(N >= 1, H, W, 1 or 3\), got \(0, 4, 5, 3\)"),
        (make(channels=2), {}, r"got \(3, 4, 5, 2\)"),
        (Samples(torch.zeros(2, 3, 5), torch.zeros(2), torch.zeros(2), 1), {}, r"got \(2, 5, 3\)"),
        (make(), {"columns": 0}, "columns=0 must be at least 1"),
        (make(), {"columns": -1}, "columns=-1 must be at least 1"),
        (make(), {"zoom": 0}, "zoom=0 must be at least 1"),
    ],
    ids=["none", "channels", "line", "no columns", "negative columns", "no zoom"],
)
def test_grids_that_cannot_be(samples, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        samples.save_grid(tmp_path / "grid.png", **options)


def test_samples_compare_by_identity():
    samples = make()
    assert samples == samples and samples != make() and len(samples) == 3
