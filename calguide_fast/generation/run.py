"""The loop: batch after batch, until none is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calguide_fast.generation.plan import Plan
from calguide_fast.generation.progress import Progress
from calguide_fast.generation.shards import Shards
from calguide_fast.generation.team import Team
from calguide_fast.sampler import FDivSampler


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

    `process` is what every batch gives the sampler: steps, method, recurrence.

    Raises:
        Interrupted: a signal came; the batch in hand was finished.
        TeammateFailed: another process gave up.
        OSError: a shard cannot be written; it is named.
        ValueError: images that are not finite.
    """
    for batch in team.deal(missing):
        team.check()
        pixels = _sample(sampler, plan, batch, process)
        shards.write(batch, pixels)
        progress.update(team.add("images", len(pixels)))
        team.add("batches", 1)
    if team.rank == 0:
        team.wait_for_count("batches", len(missing))
        progress.update(team.add("images", 0))


def _sample(sampler: FDivSampler, plan: Plan, batch: int, process: Mapping[str, Any]) -> np.ndarray:
    """(B, H, W, C) uint8."""
    images = plan.images(batch)
    samples = sampler.sample(plan.labels[images], plan.seeds[images], progress=False, **process)
    if not samples.images.isfinite().all():
        raise ValueError(
            f"images {images.start}-{images.stop - 1} are not all finite: the networks overflow, as float16 can, or "
            "the guidance is far too strong"
        )
    return samples.to_uint8().numpy()
