"""The loop: batch after batch, until none is missing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calguide_fast.generation.plan import Plan
from calguide_fast.generation.progress import Progress
from calguide_fast.generation.shards import Shards
from calguide_fast.generation.team import Team
from calguide_fast.sampler import FDivSampler

PATIENCE_SECONDS = 60.0  # at least, until who holds a batch is believed dead
PATIENCE_BATCHES = 3.0  # and as many times what the slowest batch took


class ImagesNotFinite(ValueError):
    """The networks or the guidance overflow."""


def sample_missing(
    sampler: FDivSampler,
    plan: Plan,
    shards: Shards,
    missing: Sequence[int],
    team: Team,
    progress: Progress,
    process: Mapping[str, Any],
) -> None:
    """Sample the missing batches, shared out among the team; rank 0 returns when all are there.

    A process that dies without a word leaves the batch in its hands undone. Rank 0 samples it, in the end: it is the
    same whoever does, and where the other was slow and not dead, nothing is lost but the work.

    `process` is what every batch gives the sampler: steps, method, recurrence.

    Raises:
        Interrupted: a signal came; the batch in hand was finished.
        TeammateFailed: another process gave up.
        OSError: a shard cannot be written; it is named.
        ImagesNotFinite: they are named.
    """

    def finish(batch: int) -> None:
        team.check()
        start = time.monotonic()
        pixels = _sample(sampler, plan, batch, process)
        seconds = time.monotonic() - start
        if team.is_done(batch):
            return  # by rank 0, who took this process for dead, or by one whom rank 0 took for dead
        shards.write(batch, pixels, seconds)
        if team.done(batch):
            progress.update(team.add("images", len(pixels)))

    for batch in team.deal(missing):
        finish(batch)
    if team.rank == 0:
        for batch in team.overdue(missing, lambda: _patience(shards, missing)):
            patience = _patience(shards, missing)
            progress.say(f"nobody has finished a batch for {patience:.0f} s: batch {batch} is sampled here, too")
            finish(batch)
        progress.update(team.add("images", 0))


def _patience(shards: Shards, missing: Sequence[int]) -> float:
    """For how many seconds to wait for a batch, by what others took: in this run, or in the runs before it."""
    seconds = shards.seconds()
    here = [seconds[batch] for batch in missing if batch in seconds]
    return max(PATIENCE_SECONDS, PATIENCE_BATCHES * max(here or seconds.values(), default=0.0))


def _sample(sampler: FDivSampler, plan: Plan, batch: int, process: Mapping[str, Any]) -> np.ndarray:
    """(B, H, W, C) uint8."""
    images = plan.images(batch)
    samples = sampler.sample(plan.labels[images], plan.seeds[images], progress=False, **process)
    if not samples.images.isfinite().all():
        raise ImagesNotFinite(
            f"images {images.start}-{images.stop - 1} are not all finite: the networks overflow, as float16 can, or "
            "the guidance is far too strong"
        )
    return samples.to_uint8().numpy()
