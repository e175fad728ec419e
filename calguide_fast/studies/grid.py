"""The points of a sweep: every divergence with every alpha and epsilon at every scale."""

from __future__ import annotations

import argparse
from pathlib import Path

from calguide_fast.generation.job import Job
from calguide_fast.generation.options import options_of
from calguide_fast.generation.presets import guidance_of
from calguide_fast.studies.series import Point

DIVERGENCES = ("none", "reverse_kl", "forward_kl", "js")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's own scale


def grid_points(options: argparse.Namespace) -> list[Point]:
    """The points that the options of ``calguide-fast sweep`` ask for; of ``none`` one for each scale.

    All have the same seeds, labels, steps and number of images. A list that is not given is the recipe's own value;
    strengths, around it; divergences, :data:`DIVERGENCES`. The strength is the scale, or, by EluCD's rule for EDM,
    where the scale cancels, ``max_guidance``.

    Raises:
        ValueError, TypeError: a value that is not understood, twice there, or refused by guidance.
    """
    rule = {} if options.rule is None else {"rule": options.rule}
    own = guidance_of(options.preset, options.recipe, options.method, rule)
    if own is None:
        raise ValueError(f"recipe={options.recipe!r} has no guidance, so there is nothing to sweep")
    strength, other = ("max_guidance", "scale") if own.rule == "edm" else ("scale", "max_guidance")
    given = {name: _numbers(name, getattr(options, name)) for name in (strength, other)}
    if given[other]:
        raise ValueError(
            f"{other}={getattr(options, other)!r} has no effect with rule={own.rule!r}, whose strength is {strength}"
        )
    strengths = given[strength] or [getattr(own, strength) * factor for factor in FACTORS]
    alphas: list[float | None] = [*_numbers("alpha", options.alpha)] or [None]
    epsilons: list[float | None] = [*_numbers("epsilon", options.epsilon)] or [None]
    divergences = _texts("divergence", options.divergence) or list(DIVERGENCES)
    return [
        _point(options, {"divergence": divergence, "alpha": alpha, "epsilon": epsilon, strength: value})
        for divergence in divergences
        for alpha in (alphas if divergence != "none" else [None])
        for epsilon in (epsilons if divergence != "none" else [None])
        for value in strengths
    ]


def _point(options: argparse.Namespace, guidance: dict[str, str | float | None]) -> Point:
    given = {**vars(options), **guidance, "grid": 100, "png": False, "resume": True}
    job = Job.of(options_of(options.preset, Path(options.out), given))
    assert job.guidance is not None
    columns: dict[str, str | float | None] = {name: getattr(job.guidance, name) for name in guidance}
    if job.guidance.divergence == "none":
        columns |= {"alpha": None, "epsilon": None}
    signs = {"alpha": "a", "epsilon": "e", "scale": "s", "max_guidance": "m"}
    parts = [f"{sign}{columns[name]:g}" for name, sign in signs.items() if columns.get(name) is not None]
    return Point("-".join([job.guidance.divergence.replace(":", ""), *parts]), columns, job)


def _texts(name: str, text: str | None) -> list[str]:
    values = [] if text is None else [value.strip() for value in text.split(",")]
    if text is not None and ("" in values or len(set(values)) < len(values)):
        raise ValueError(f"{name}={text!r} must be different values with commas between them")
    return values


def _numbers(name: str, text: str | None) -> list[float]:
    texts = _texts(name, text)
    try:
        values = [float(value) for value in texts]
    except ValueError:
        raise ValueError(f"{name}={text!r} must be numbers with commas between them, like 0.5,1,2") from None
    # 1 and 1.0 are one
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={text!r} must be different values with commas between them")
    return values
