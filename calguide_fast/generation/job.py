"""A job: what a command line asks for, with all that follows from its preset and recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from calguide_fast import models
from calguide_fast.ensemble import shares
from calguide_fast.generation.networks import Sources
from calguide_fast.generation.plan import Plan, canonical_labels, format_integers
from calguide_fast.generation.presets import PRESETS, RECIPES, guidance_of
from calguide_fast.generation.settings import LATER, Settings, file_hash, without_later
from calguide_fast.guidance import Guidance
from calguide_fast.karras import Churn
from calguide_fast.method_settings import check_batch_size, check_method_settings
from calguide_fast.ops.checks import number
from calguide_fast.sampler import FDivSampler

CHURN = tuple(field.name for field in fields(Churn))
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """Which networks sample which images, and how."""

    options: argparse.Namespace
    guidance: Guidance | None
    sources: Sources
    plan: Plan
    steps: str | int
    null_class: int | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Job:
        """What the options of ``calguide-fast sample`` ask for. Raises ValueError or TypeError for what they cannot."""
        preset = PRESETS[options.preset]
        check_method_settings(
            options.method,
            options.eta,
            Churn(**{name: getattr(options, name) for name in CHURN}),
            (options.sigma_min, options.sigma_max),
        )
        changes = {
            field.name: value for field in fields(Guidance) if (value := getattr(options, field.name, None)) is not None
        }
        guidance = guidance_of(options.preset, options.recipe, options.method, changes)
        sources = Sources.of(
            options.preset, options.unet, options.classifier or (), guidance is not None, _softplus_beta(options)
        )
        shares(len(sources.classifiers), options.classifier_weights)
        batch_size = preset.batch_size if options.batch_size is None else options.batch_size
        check_batch_size(guidance, batch_size)
        plan = Plan.of(
            options.num_samples, batch_size, options.seeds, options.labels, preset.num_classes, preset.num_samples
        )
        if options.grid < 0:
            raise ValueError(f"grid must be a number of images, 0 or more, got {options.grid}")
        steps = preset.steps if options.steps is None else options.steps
        return cls(options, guidance, sources, plan, int(steps) if steps.isdecimal() else steps, _null_class(options))

    @property
    def process(self) -> dict[str, Any]:
        """How the sampler is to go through every batch: keywords of `FDivSampler.sample`."""
        return {"steps": self.steps, "method": self.options.method, "recurrence": self.options.recurrence}

    def sampler(self, device: torch.device) -> FDivSampler:
        """The sampler, with the weights that the options name.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `Sources.load` and `FDivSampler`; a null class that the UNet
                has no embedding for.
        """
        options, networks = self.options, self.sources.load()
        known: int | None = networks.unet.num_classes  # type: ignore[assignment]
        if self.null_class is not None and known is not None and self.null_class >= known:
            raise ValueError(f"null-class={self.null_class} is no label of the model, which knows 0..{known - 1}")
        # of convolutions that cuDNN computes in several ways, one that gives the same bits each time
        torch.backends.cudnn.deterministic = True
        return FDivSampler(
            networks.unet.to(device),
            [classifier.to(device) for classifier in networks.classifiers] or None,
            self.guidance,
            PRESETS[options.preset].schedule,
            networks.classifier_input,
            classifier_weights=options.classifier_weights,
            cfg_scale=options.cfg_scale,
            null_class=self.null_class,
            eta=options.eta,
            **{name: getattr(options, name) for name in CHURN},
            sigma_range=(options.sigma_min, options.sigma_max),
            diagnostics=False,
            device=device,
            cuda_graph=options.cuda_graph,
            compile=options.compile,
            dtype=DTYPES[options.dtype],
            channels_last=options.channels_last,
        )

    def settings(self) -> Settings:
        """All that decides the images. Where they come from, and on which machines, is not among it."""
        options, sources, plan = self.options, self.sources, self.plan
        names, weights = sources.architectures, options.classifier_weights
        equal, asked = (shares(len(names), given) for given in (None, weights))
        table = {
            "preset": options.preset,
            # one by its name, as before there could be several
            "classifier": (names[0] if names else None) if len(names) < 2 else list(names),
            "classifier_weights": None if asked == equal else asked,
            "softplus_beta": sources.softplus_beta,
            "sha256": {name: file_hash(path) for name, path in sources.files.items()},
            "num_samples": len(plan),
            "batch_size": plan.batch_size,
            "seeds": format_integers(seed % 2**64 for seed in plan.seeds.tolist()),
            "labels": canonical_labels(options.labels),
            "method": options.method,
            "steps": self.steps,
            "eta": options.eta,
            **{name: getattr(options, name) for name in (*CHURN, "sigma_min", "sigma_max")},
            "recurrence": options.recurrence,
            "cfg_scale": options.cfg_scale,
            "null_class": self.null_class,
            "guidance": None if self.guidance is None else asdict(self.guidance),
            "dtype": options.dtype,
            "channels_last": options.channels_last,
            "compile": options.compile,
        }
        return without_later(table)


def _softplus_beta(options: argparse.Namespace) -> float | None:
    """What is asked for, 0 being ReLU; else the recipe's, where the classifier has ReLUs to replace."""
    if options.softplus_beta is not None:
        return number("softplus-beta", options.softplus_beta, low=0.0) or None
    noise_aware = any(classifier.partition(":")[0] in models.PRESETS for classifier in options.classifier or ())
    return None if noise_aware else RECIPES[options.recipe].softplus_beta


def _null_class(options: argparse.Namespace) -> int | None:
    """The label of classifier-free guidance's other half: what is asked for, or else the preset's own."""
    if options.cfg_scale == LATER["cfg_scale"]:
        if options.null_class is not None:
            raise ValueError(f"null-class={options.null_class} has no use without --cfg-scale")
        return None
    null_class = PRESETS[options.preset].null_class if options.null_class is None else options.null_class
    if null_class is None:
        raise ValueError(
            f"cfg-scale={options.cfg_scale} needs --null-class, the label that makes the model unconditional; OpenAI's "
            "models were trained without one"
        )
    return null_class
