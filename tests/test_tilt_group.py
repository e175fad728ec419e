"""Tilting over the ranks of a process group gives what one process gives for all their images together."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent / "sampler"))
from toys import classifier, unet  # noqa: E402

from calguide_fast import FDivSampler, tilt_weights  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")

RANKS = 2
LABELS, SEEDS = torch.tensor([0, 3, 4, 1, 2, 2]), torch.arange(6)
SCORES = torch.linspace(-9, 2, 6)
SETTINGS = {
    "mean": (-0.4, "mean", None),
    "sum": (1.7, "sum", None),
    "clipped": (0.6, "mean", 1.5),
    "none": (0.0, "mean", None),
}
# of each rank's images
PARTS = {
    "equal": (slice(0, 3), slice(3, 6)),
    "unequal": (slice(0, 5), slice(5, 6)),
    "empty": (slice(0, 6), slice(6, 6)),
}
METHODS = {"ddpm": 5, "heun": 4}


def with_nan() -> torch.Tensor:
    return torch.cat([torch.tensor([math.nan]), SCORES[1:]])


def sample(method: str, part: slice, group=None):
    sampler = FDivSampler(unet(), classifier(), scale=3.0, tilt=-1.0, group=group)
    return sampler.sample(LABELS[part], SEEDS[part], METHODS[method], method, progress=False)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    found = {
        (parts, name): tilt_weights(SCORES[PARTS[parts][rank]], *settings, group=group)
        for parts in PARTS
        for name, settings in SETTINGS.items()
    }
    found["double"] = tilt_weights(SCORES[PARTS["equal"][rank]].double(), -0.4, group=group)
    found["nan"] = tilt_weights(with_nan()[PARTS["equal"][rank]], -0.4, group=group)
    for method in METHODS:
        samples = sample(method, PARTS["equal"][rank], group)
        found[method] = samples.images, samples.diagnostics.tilt_weight
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank found."""
    folder = str(tmp_path_factory.mktemp("group"))
    mp.spawn(work, (folder,), RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_weights(name, parts, found):
    together = torch.cat([one[parts, name] for one in found])
    assert together.dtype == torch.float32
    assert torch.allclose(together, tilt_weights(SCORES, *SETTINGS[name]), rtol=1e-6)


def test_double_stays_double_and_nan_reaches_every_rank(found):
    together = torch.cat([one["double"] for one in found])
    assert together.dtype == torch.float64
    assert torch.allclose(together, tilt_weights(SCORES.double(), -0.4), rtol=1e-14)
    assert all(one["nan"].isnan().all() for one in found)


@pytest.mark.parametrize("method", METHODS)
def test_samples(method, found):
    alone = sample(method, slice(0, 6))
    images, weights = (torch.cat(parts, dim) for parts, dim in zip(zip(*(one[method] for one in found)), (0, 1)))
    assert torch.allclose(images, alone.images, atol=1e-4)
    assert torch.allclose(weights, alone.diagnostics.tilt_weight, rtol=1e-3)
    apart = torch.cat([sample(method, part).images for part in PARTS["equal"]])
    assert (apart - alone.images).abs().max() > 0.01, "the group must matter for the test to mean something"
