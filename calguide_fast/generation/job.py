"""A job: what a command line asks for, with all that follows from its preset and recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields

import torch

from calguide_fast import models
from calguide_fast.generation.networks import Sources
from calguide_fast.generation.plan import Plan, canonical_labels, format_integers
from calguide_fast.generation.presets import PRESETS, RECIPES, guidance_of
from calguide_fast.generation.settings import Settings, file_hash
from calguide_fast.guidance import Guidance
from calguide_fast.ops.checks import number
from calguide_fast.sampler import FDivSampler

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """Which networks sample which images, and how."""

    options: argparse.Namespace
    guidance: Guidance | None
    sources: Sources
    plan: Plan
    steps: str | int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Job:
        """What the options of ``calguide-fast sample`` ask for. Raises ValueError or TypeError for what they cannot."""
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
        return cls(options, guidance, sources, plan, int(steps) if steps.isdecimal() else steps)

    def sampler(self, device: torch.device) -> FDivSampler:
        """The sampler, with the weights that the options name."""
        networks = self.sources.load()
        # of convolutions that cuDNN computes in several ways, one that gives the same bits each time
        torch.backends.cudnn.deterministic = True
        return FDivSampler(
            networks.unet.to(device),
            None if networks.classifier is None else networks.classifier.to(device),
            self.guidance,
            PRESETS[self.options.preset].schedule,
            networks.classifier_input,
            eta=self.options.eta,
            diagnostics=False,
            device=device,
            cuda_graph=self.options.cuda_graph,
            compile=self.options.compile,
            dtype=DTYPES[self.options.dtype],
            channels_last=self.options.channels_last,
        )

    def settings(self) -> Settings:
        """All that decides the images. Where they come from, and on which machines, is not among it."""
        options, sources, plan = self.options, self.sources, self.plan
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
            "steps": self.steps,
            "eta": options.eta,
            "guidance": None if self.guidance is None else asdict(self.guidance),
            "dtype": options.dtype,
            "channels_last": options.channels_last,
            "compile": options.compile,
        }


def _softplus_beta(options: argparse.Namespace) -> float | None:
    """What is asked for, 0 being ReLU; else the recipe's, where the classifier has ReLUs to replace."""
    if options.softplus_beta is not None:
        return number("softplus-beta", options.softplus_beta, low=0.0) or None
    noise_aware = options.classifier is not None and options.classifier.partition(":")[0] in models.PRESETS
    return None if noise_aware else RECIPES[options.recipe].softplus_beta
