"""Keeping steps on the way: which, and what of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import classifier, unet

from calguide_fast import FDivSampler, Guidance

LABELS = torch.tensor([0, 3, 4, 1, 2])


def sample(trajectory, trajectory_of="x", method="ddpm", callback=None, **options):
    sampler = FDivSampler(unet(), classifier(), Guidance(scale=3.0, interval=(0.5, 50.0)), **options)
    return sampler.sample(
        LABELS,
        range(5),
        8,
        method,
        batch_size=3,
        progress=False,
        callback=callback,
        trajectory=trajectory,
        trajectory_of=trajectory_of,
    )


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
def test_all_steps_are_what_the_callback_sees(method):
    seen = []
    kept = sample(True, "x", method, lambda step: seen.append((step.sigma, step.x_t.clone())))
    trajectory = kept.trajectory
    assert trajectory.images.shape == (8, 5, 3, 6, 6) and trajectory.of == "x" and len(trajectory) == 8
    assert trajectory.steps.tolist() == list(range(8))
    assert trajectory.sigmas.tolist() == [sigma for sigma, _ in seen[:8]]
    assert torch.equal(trajectory.images[-1], kept.images)
    assert torch.equal(trajectory.images[3], torch.cat([seen[3][1], seen[11][1]]))
    assert torch.equal(kept.images, sample(False, "x", method).images)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun", "dpmpp"])
def test_predictions(method):
    """Of unguided steps, too; where a step is guided it is what was classified."""
    seen = []
    kept = sample(True, "x0", method, lambda step: seen.append(step.x0.clone()))
    images = kept.trajectory.images
    assert torch.equal(images[:, :3], torch.stack(seen[:8])) and images.abs().max() <= 1
    classified = []
    sample(False, "x", method, lambda step: classified.append(step.x0 if step.x0 is None else step.x0.clone()))
    guided = [i for i in range(8) if classified[i] is not None]
    assert 0 < len(guided) < 8
    assert all(torch.equal(images[i, :3], classified[i]) for i in guided)
    assert torch.equal(kept.images, sample(False, "x", method).images)
    # the last step ends at its prediction, as guidance is off there
    assert torch.allclose(images[-1], kept.images, atol=1e-5)


@pytest.mark.parametrize(("kept", "steps"), [(1, [7]), (np.int64(3), [1, 4, 7]), (8, list(range(8)))])
def test_some_steps(kept, steps):
    trajectory = sample(kept).trajectory
    assert trajectory.steps.tolist() == steps
    assert torch.equal(trajectory.images, sample(True).trajectory.images[steps])


def test_nothing_is_kept_unless_asked_for():
    assert sample(False).trajectory is None and sample(0).trajectory is None


@pytest.mark.parametrize(
    ("trajectory", "of", "message"),
    [
        (9, "x", "trajectory=9 must be True or a number of steps to keep, in 0..8"),
        (-1, "x", "trajectory=-1"),
        (2.5, "x", "trajectory=2.5"),
        (True, "eps", "trajectory_of='eps' must be 'x' or 'x0'"),
    ],
)
def test_wrong_trajectories(trajectory, of, message):
    with pytest.raises(ValueError, match=message):
        sample(trajectory, of)
