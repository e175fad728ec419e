"""What ``calguide-fast sample`` does: options in, a folder of samples out."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import calguide_fast
from calguide_fast.generation.devices import describe, own_device
from calguide_fast.generation.folder import open_folder, see_folder
from calguide_fast.generation.job import Job
from calguide_fast.generation.outputs import write_outputs
from calguide_fast.generation.progress import Progress
from calguide_fast.generation.run import sample_missing
from calguide_fast.generation.settings import Settings, differences, settings_hash
from calguide_fast.generation.shards import DamagedShard, Shards
from calguide_fast.generation.team import Team
from calguide_fast.generation.together import say, together

HOW_TO_GO_ON = "the same command with --resume samples what is missing"


def run_sample(options: argparse.Namespace) -> int:
    """Sample as the options say, alone or as one of torchrun's processes; returns the exit status.

    Raises:
        ValueError, TypeError: settings that are wrong or contradict each other, a folder that is not to be touched, a
            damaged file.
        OSError: a file cannot be read or written; it is named.
    """

    def work(team: Team) -> None:
        written = sample(Job.of(options), options.out, options.resume, team)
        if written is not None:
            print(written)

    return together(work, options.preset, HOW_TO_GO_ON)


def sample(job: Job, out: Path, resume: bool, team: Team, how_to_go_on: str = HOW_TO_GO_ON) -> Path | None:
    """Do this process's share of a job, in the folder `out`; rank 0 returns the .npz file, when all is there.

    Raises as :func:`run_sample` and :meth:`Team.check`.
    """
    device = own_device(job.options.device)
    sampler = job.sampler(device)
    # no images yet, but all that is wrong is found before a folder is made
    sampler.sample([], seeds=[], progress=False, **job.process)

    plan = job.plan
    processes = team.gather("process", describe(device))
    if team.silent:
        say(f"no word from rank {', '.join(map(str, sorted(team.silent)))}: going on without, unless they still come")
    settings = agreed_settings(job, team)
    shards = Shards(out, settings_hash(settings), team.rank)
    missing = team.from_first("missing", lambda: _missing(job, out, resume, settings, shards, processes))
    see_folder(out, settings, team.check)

    done = len(plan) - sum(len(plan.seeds[plan.images(batch)]) for batch in missing)
    try:
        with Progress(len(plan), done, show=team.rank == 0) as progress:
            sample_missing(sampler, plan, shards, missing, team, progress, job.process)
        if team.rank != 0:
            return None
        return write_outputs(out, plan, shards, job.options.grid, job.options.png, team.check)
    except (OSError, DamagedShard):
        say(f"batches that are done are kept; {how_to_go_on}")
        raise


def agreed_settings(job: Job, team: Team) -> Settings:
    """The settings of all the team's processes.

    Raises ValueError where this one has others than rank 0: it was started with other options, or reads other
    checkpoints by the same names, as from its own machine's disk.
    """
    own = json.loads(json.dumps(job.settings()))
    settings = team.from_first("settings", lambda: own)
    if found := differences(settings, own):
        raise ValueError("this process has other settings than rank 0, which is there:\n  " + "\n  ".join(found))
    return settings


def _missing(
    job: Job, out: Path, resume: bool, settings: Settings, shards: Shards, processes: list[dict[str, Any] | None]
) -> list[int]:
    """Rank 0 opens the folder, and finds the batches that are to be sampled."""
    this_run: dict[str, Any] = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "calguide_fast": calguide_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processes": processes,
        "checkpoints": {name: str(path) for name, path in job.sources.files.items()},
        "cuda_graph": job.options.cuda_graph,
    }
    open_folder(out, settings, this_run, resume, say)
    return shards.missing(job.plan.num_batches, say)
