"""What ``calguide-fast sample`` does: options in, a folder of samples out."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import distributed

import calguide_fast
from calguide_fast import models
from calguide_fast.demo.threads import one_thread
from calguide_fast.generation.devices import describe, own_device
from calguide_fast.generation.folder import open_folder, see_folder
from calguide_fast.generation.interrupts import Interrupted, Interrupts
from calguide_fast.generation.networks import Sources
from calguide_fast.generation.outputs import write_outputs
from calguide_fast.generation.plan import Plan, canonical_labels, format_integers
from calguide_fast.generation.presets import DIGITS, PRESETS, RECIPES, guidance_of
from calguide_fast.generation.progress import Progress
from calguide_fast.generation.run import sample_missing
from calguide_fast.generation.settings import Settings, file_hash, settings_hash
from calguide_fast.generation.shards import DamagedShard, Shards
from calguide_fast.generation.team import Team, TeammateFailed
from calguide_fast.guidance import Guidance
from calguide_fast.ops.checks import number
from calguide_fast.sampler import FDivSampler

HOW_TO_GO_ON = "the same command with --resume samples what is missing"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_sample(options: argparse.Namespace) -> int:
    """Sample as the options say, alone or as one of torchrun's processes; returns the exit status.

    Raises:
        ValueError, TypeError: settings that are wrong or contradict each other, a folder that is not to be touched, a
            damaged file.
        OSError: a file cannot be read or written; it is named.
    """
    with Interrupts(_say if int(os.environ.get("RANK", 0)) == 0 else _silence) as interrupts:
        team = Team.from_environment(interrupts)
        try:
            # networks as small as the digits' are quickest, and the same in every process, on one thread
            with one_thread() if options.preset == DIGITS else nullcontext():
                _run(options, team)
        except Interrupted as stop:
            team.fail(str(stop))
            if team.rank == 0:
                _say(f"{stop}; {HOW_TO_GO_ON}")
            return stop.status
        except TeammateFailed as failure:
            if team.rank == 0:
                _say(f"{failure}; {HOW_TO_GO_ON}")
            return 1
        except distributed.DistError as error:
            # as when the launcher was killed, which keeps the store
            _say(f"the store that the processes of this run share does not answer: {error}; {HOW_TO_GO_ON}")
            return 1
        except BaseException as error:
            team.fail(str(error))
            raise
    return 0


def _run(options: argparse.Namespace, team: Team) -> None:
    preset = PRESETS[options.preset]
    changes = {
        field.name: value for field in fields(Guidance) if (value := getattr(options, field.name, None)) is not None
    }
    guidance = guidance_of(options.preset, options.recipe, options.method, changes)
    sources = Sources.of(
        options.preset, options.unet, options.classifier, guidance is not None, _softplus_beta(options)
    )
    batch_size = preset.batch_size if options.batch_size is None else options.batch_size
    plan = Plan.of(
        options.num_samples, batch_size, options.seeds, options.labels, preset.num_classes, preset.num_samples
    )
    if options.grid < 0:
        raise ValueError(f"grid must be a number of images, 0 or more, got {options.grid}")
    steps = preset.steps if options.steps is None else options.steps
    steps = int(steps) if steps.isdecimal() else steps

    device = own_device(options.device)
    sampler = _sampler(options, sources, guidance, preset.schedule, device)
    # no images yet, but all that is wrong is found before a folder is made
    sampler.sample([], seeds=[], steps=steps, method=options.method, progress=False)

    devices = team.gather("device", describe(device))
    settings = team.from_first("settings", lambda: _settings(options, sources, guidance, plan, steps))
    shards = Shards(options.out, settings_hash(settings), team.rank)
    missing = team.from_first("missing", lambda: _missing(options, settings, sources, plan, shards, devices))
    see_folder(options.out, settings, team.check)

    done = len(plan) - sum(len(plan.seeds[plan.images(batch)]) for batch in missing)
    try:
        with Progress(len(plan), done, show=team.rank == 0) as progress:
            sample_missing(sampler, plan, shards, missing, team, progress, steps, options.method)
        if team.rank == 0:
            print(write_outputs(options.out, plan, shards, options.grid, options.png, team.check))
    except (OSError, DamagedShard):
        _say(f"batches that are done are kept; {HOW_TO_GO_ON}")
        raise


def _softplus_beta(options: argparse.Namespace) -> float | None:
    """What is asked for, 0 being ReLU; else the recipe's, where the classifier has ReLUs to replace."""
    if options.softplus_beta is not None:
        return number("softplus-beta", options.softplus_beta, low=0.0) or None
    noise_aware = options.classifier is not None and options.classifier.partition(":")[0] in models.PRESETS
    return None if noise_aware else RECIPES[options.recipe].softplus_beta


def _sampler(
    options: argparse.Namespace, sources: Sources, guidance: Guidance | None, schedule: str, device: torch.device
) -> FDivSampler:
    networks = sources.load()
    # of convolutions that cuDNN computes in several ways, one that gives the same bits each time
    torch.backends.cudnn.deterministic = True
    return FDivSampler(
        networks.unet.to(device),
        None if networks.classifier is None else networks.classifier.to(device),
        guidance,
        schedule,
        networks.classifier_input,
        eta=options.eta,
        diagnostics=False,
        device=device,
        cuda_graph=options.cuda_graph,
        compile=options.compile,
        dtype=DTYPES[options.dtype],
        channels_last=options.channels_last,
    )


def _settings(
    options: argparse.Namespace, sources: Sources, guidance: Guidance | None, plan: Plan, steps: str | int
) -> Settings:
    """All that decides the images. Where they come from, and on which machines, is not among it."""
    return {
        "preset": options.preset,
        "classifier": sources.architecture,
        "softplus_beta": sources.softplus_beta,
        "sha256": {name: file_hash(path) for name, path in sources.files.items()},
        "num_samples": len(plan),
        "batch_size": plan.batch_size,
        "seeds": format_integers(seed % 2**64 for seed in plan.seeds.tolist()),
        "labels": canonical_labels(options.labels),
        "method": options.method,
        "steps": steps,
        "eta": options.eta,
        "guidance": None if guidance is None else asdict(guidance),
        "dtype": options.dtype,
        "channels_last": options.channels_last,
        "compile": options.compile,
    }


def _missing(
    options: argparse.Namespace, settings: Settings, sources: Sources, plan: Plan, shards: Shards, devices: list[str]
) -> list[int]:
    """Rank 0 opens the folder, and finds the batches that are to be sampled."""
    this_run: dict[str, Any] = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "calguide_fast": calguide_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "devices": devices,
        "checkpoints": {name: str(path) for name, path in sources.files.items()},
        "cuda_graph": options.cuda_graph,
    }
    open_folder(options.out, settings, this_run, options.resume, _say)
    return shards.missing(plan.num_batches, _say)


def _say(message: str) -> None:
    print(f"calguide-fast: {message}", file=sys.stderr, flush=True)


def _silence(_: str) -> None:
    pass
