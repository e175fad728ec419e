"""Published settings: what each model is sampled with, and the recipes of guidance that papers and we ourselves use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from calguide_fast import models
from calguide_fast.demo.networks import NULL_CLASS
from calguide_fast.guidance import Guidance

DIGITS = "digits"


@dataclass(frozen=True)
class Recipe:
    """A way of guiding; its scale depends on the model and is the preset's.

    Attributes:
        about: what it is, and whose.
        guidance: its settings, or None for no guidance.
        softplus_beta: of the Softplus that stands for ReLU in a classifier of clean images; None keeps ReLU.
    """

    about: str
    guidance: Guidance | None
    softplus_beta: float | None = None


_ELUCD = Guidance("none", joint_temperature=1.0, marginal_temperature=0.5, sine_boost=0.3)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "ours": Recipe(
            "elucd + Jensen-Shannon divergence, with alpha 1 and epsilon 0.9, which are ours: the paper's are not "
            "known (arXiv 2511.05844)",
            replace(_ELUCD, divergence="js", alpha=1.0, epsilon=0.9),
            softplus_beta=3.0,
        ),
        "elucd": Recipe(
            "log-probability, joint temperature 1, marginal 0.5, sine boost 0.3, Softplus beta 3: EluCD's "
            "ImageNet-128 run (arXiv 2310.11311)",
            _ELUCD,
            softplus_beta=3.0,
        ),
        "elucd-edm": Recipe(
            "log-probability, joint temperature 1, marginal 0, EluCD's rule for EDM with max guidance 0.004 and add "
            "factor 0.3, Softplus beta 5: the ImageNet-64 run of its code, with ResNet-101 and 10 Heun steps (arXiv "
            "2310.11311). That is on EDM's denoiser; for none of the models here is it published. Needs --method heun",
            Guidance(
                "none",
                joint_temperature=1.0,
                marginal_temperature=0.0,
                rule="edm",
                max_guidance=0.004,
                add_factor=0.3,
            ),
            softplus_beta=5.0,
        ),
        "adm-g": Recipe(
            "log-probability at temperature 1, for ADM's noise-aware classifier (arXiv 2105.05233)",
            Guidance("none", marginal_temperature=1.0),
        ),
        "unguided": Recipe("the model alone, with no classifier", None),
    }
)


@dataclass(frozen=True)
class Preset:
    """How a model is sampled if nothing else is asked for.

    Attributes:
        num_classes: of its labels.
        schedule: name of the β schedule.
        scales: the guidance scale of each recipe that has one.
        num_samples: how many images figures are published of.
        batch_size: images at a time.
        steps: in OpenAI's respacing notation.
        null_class: the label that makes the model unconditional, if it was trained with one.
    """

    num_classes: int
    schedule: str
    scales: Mapping[str, float]
    num_samples: int = 50_000
    batch_size: int = 64
    steps: str = "250"
    null_class: int | None = None


def _published(name: str) -> Preset:
    model = models.PRESETS[name]
    # EluCD's scale 1 is published for 128×128; at other sizes it is where to begin
    return Preset(1000, model.schedule, {"adm-g": model.classifier_scale, "elucd": 1.0, "ours": 1.0})


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        **{name: _published(name) for name in models.PRESETS},
        # scales that the demo's sweep chose
        DIGITS: Preset(10, "linear", {"adm-g": 16.0, "elucd": 0.2, "ours": 0.2}, 2000, 200, "25", NULL_CLASS),
    }
)


def guidance_of(preset: str, recipe: str, method: str, changes: Mapping[str, Any]) -> Guidance | None:
    """A recipe's guidance of a preset's model, with some fields changed.

    Raises:
        ValueError: for a field without guidance, one that has no effect, and as Guidance does.
    """
    guidance = RECIPES[recipe].guidance
    if guidance is None:
        if changes:
            raise ValueError(f"the recipe {recipe} has no guidance, and takes none of {', '.join(sorted(changes))}")
        return None
    # the boost is of DDPM's variance
    boost = guidance.sine_boost if method == "ddpm" else 0.0
    scale = PRESETS[preset].scales.get(recipe, guidance.scale)
    guidance = replace(guidance, **{"scale": scale, "sine_boost": boost, **changes})
    for name in ("alpha", "epsilon"):
        if guidance.divergence == "none" and name in changes:
            raise ValueError(f"{name}={changes[name]} is of a divergence, and the recipe {recipe} has none: give one")
    for name, rule, instead in (
        ("max_guidance", "edm", "scale"),
        ("add_factor", "edm", "scale"),
        ("scale", "score", "max_guidance"),
    ):
        if guidance.rule != rule and name in changes:
            raise ValueError(
                f"{name}={changes[name]} has no effect with rule={guidance.rule!r}, whose strength is {instead}"
            )
    return guidance
