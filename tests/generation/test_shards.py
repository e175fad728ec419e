"""Shards and outputs: whole or not at all, and nothing trusted without its checksum."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from calguide_fast import Samples
from calguide_fast.generation import atomic
from calguide_fast.generation.outputs import write_outputs
from calguide_fast.generation.plan import Plan
from calguide_fast.generation.settings import differences, settings_hash
from calguide_fast.generation.shards import DamagedShard, Shards

HASH = settings_hash({"scale": 1.0})


def make(folder, channels=3) -> tuple[Samples, Plan, Shards]:
    """Seven images of 4×5 pixels, in shards of three."""
    images = torch.rand(7, channels, 4, 5) * 2 - 1
    plan = Plan(torch.arange(7) % 2, torch.arange(7) - 1, 3)
    samples = Samples(images, plan.labels, plan.seeds, 3)
    (folder / "shards").mkdir()
    shards = Shards(folder, HASH)
    for batch in range(plan.num_batches):
        shards.write(batch, samples.to_uint8()[plan.images(batch)].numpy())
    return samples, plan, shards


def fill_disk(monkeypatch) -> None:
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_shard_is_read_as_it_was_written(tmp_path):
    samples, plan, shards = make(tmp_path)
    recorded = shards.recorded()
    read = [shards.read(batch, recorded[batch]) for batch in range(3)]
    assert (np.concatenate(read) == samples.to_uint8().numpy()).all()
    assert shards.missing(4, pytest.fail) == [3]
    # of other settings nothing counts
    assert Shards(tmp_path, "other").missing(3, pytest.fail) == [0, 1, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_shard_is_named_and_missing_until_it_is_redone(damage, tmp_path):
    samples, plan, shards = make(tmp_path)
    path = shards.path(1)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedShard, match="000001.npy"):
        shards.read(1, shards.recorded()[1])
    with pytest.raises(DamagedShard, match="000001.npy"):
        write_outputs(tmp_path, plan, shards, 4, False, lambda: None)
    assert not list(tmp_path.glob("*.npz*"))
    said = []
    assert shards.missing(3, said.append) == [1]
    assert len(said) == 1 and "000001.npy" in said[0] and "again" in said[0]
    # another rank, which rounds otherwise, redoes it: both checksums are on record then, and the file's counts
    Shards(tmp_path, HASH, rank=5).write(1, np.zeros((3, 4, 5, 3), np.uint8))
    assert shards.missing(3, pytest.fail) == []


def test_a_line_that_a_crash_cut_off_counts_for_nothing(tmp_path):
    _, _, shards = make(tmp_path)
    text = shards.manifest.read_text()
    shards.manifest.write_text(text[: text.rindex('"settings"')])
    assert shards.missing(3, pytest.fail) == [2]
    shards.write(2, np.zeros((1, 4, 5, 3), np.uint8))
    assert shards.missing(3, pytest.fail) == []


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    _, _, shards = make(tmp_path)
    fill_disk(monkeypatch)
    for batch in (1, 3):
        with pytest.raises(OSError, match=rf"No space left on device: '.*{batch:06d}.npy'"):
            shards.write(batch, np.zeros((3, 4, 5, 3), np.uint8))
    assert shards.missing(4, pytest.fail) == [3] and not list(tmp_path.rglob(f"*{atomic.SUFFIX}"))
    with pytest.raises(OSError, match="'.*manifest-0.jsonl'"):
        atomic.append_line(shards.manifest, "{}")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_npz_is_the_one_that_samples_save(channels, tmp_path):
    samples, plan, shards = make(tmp_path, channels)
    path = write_outputs(tmp_path, plan, shards, 5, True, lambda: None)
    assert path == tmp_path / f"samples_7x4x5x{channels}.npz"
    with np.load(path) as ours, np.load(samples.save_npz(tmp_path / "theirs.npz")) as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in ours.files:
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            assert (ours[name] == theirs[name]).all()

    from PIL import Image

    zoom = 64 // 4
    grid = Samples(samples.images[:5], plan.labels[:5], plan.seeds[:5], 3).save_grid(tmp_path / "theirs.png", zoom=zoom)
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == np.asarray(Image.open(grid))).all()
    single = np.asarray(Image.open(tmp_path / "png" / "0001" / "000005.png")).reshape(4, 5, channels)
    assert (single == samples.to_uint8()[5].numpy()).all() and len(list(tmp_path.glob("png/*/*.png"))) == 7


LARGE = """
import os, resource, sys, torch, numpy as np
from pathlib import Path
from calguide_fast.generation.outputs import write_outputs
from calguide_fast.generation.plan import Plan
from calguide_fast.generation.shards import Shards

os.fsync = lambda _: None
folder, count = Path(sys.argv[1]), 24
(folder / "shards").mkdir()
shards = Shards(folder, "")
plan = Plan(torch.zeros(count, dtype=torch.int64), torch.arange(count), 1)
for batch in range(count):
    shards.write(batch, np.full((1, 1024, 1024, 1), batch, np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = write_outputs(folder, plan, shards, 1, False, lambda: None)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
whole = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
try:
    write_outputs(folder, plan, shards, 1, False, lambda: None)
except OSError as error:
    print(grown, path.read_bytes() == whole, sorted(p.name for p in folder.iterdir()), error, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory and limits are Linux's")
def test_memory_does_not_grow_and_a_file_that_cannot_be_is_named(tmp_path):
    done = subprocess.run([sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    grown, kept, files, error = done.stdout.splitlines()
    # kilobytes; the images are 24 MB
    assert int(grown) < 12_000
    # the system's own refusal, half-way through
    name = "samples_24x1024x1024x1.npz"
    assert kept == "True" and files == str(["grid.png", name, "shards"])
    assert error.endswith(f"File too large: '{tmp_path / name}'")


def test_differences_are_named_by_their_place():
    there = {"steps": "250", "guidance": {"scale": 1.0, "tilt": 0.0}, "old": 1}
    here = {"steps": "25", "guidance": {"scale": 2.0, "tilt": 0.0}, "new": "x" * 100}
    found = differences(there, here)
    assert found[:2] == ["steps: 250 there, 25 here", "guidance.scale: 1.0 there, 2.0 here"]
    assert found[2].startswith("new: None there, xxx") and found[2].endswith("… here")
    assert found[3:] == ["old: 1 there, None here"]
    assert differences(there, there) == [] and settings_hash(there) != settings_hash(here)
