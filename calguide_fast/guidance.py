"""Guidance: the settings of a guided sampler, and the way from a classifier's logits to an image gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calguide_fast.ops import checks
from calguide_fast.ops.guidance import GuidanceStats, Settings, gradient_and_stats, guidance_settings
from calguide_fast.scratch import Scratch


class ImageGradient(NamedTuple):
    """The gradient of the guidance score with respect to the classifier's input, and each image's scalars."""

    gradient: Tensor  # (B, C, *spatial)
    stats: GuidanceStats | None  # of (B,) tensors; None where a cond_fn gave the gradient


@dataclass(frozen=True)
class Guidance:
    """How a classifier guides the sampler. Everything beyond the divergence is off by default.

    The score of an image is S = τ₁ f_y − logsumexp(τ₂ f) − α D(q‖p) + λ H(p); see
    :func:`calguide_fast.guidance_gradient` for the symbols. ADM-G is ``Guidance("none", marginal_temperature=1.0)``,
    EluCD's ImageNet-128 run ``Guidance("none", sine_boost=0.3)``.

    Attributes:
        divergence: ``"js"``, ``"reverse_kl"``, ``"forward_kl"``, ``"jeffreys"``, ``"hellinger"``, ``"chi2"``,
            ``"neyman_chi2"``, ``"alpha:a"`` or ``"none"``.
        alpha: α ≥ 0, weight of the divergence.
        epsilon: ε in 0..1, weight of the label in the target q.
        joint_temperature: τ₁ ≥ 0.
        marginal_temperature: τ₂ ≥ 0, absolute.
        entropy_weight: λ.
        adaptive_entropy: λ_b = λ (1 − H/log C) for each image.
        entropy_scaling: None, or the largest factor allowed when the gradient is multiplied by log C / H(p)
            (ED-DPM, arXiv 2206.11474), which is at least 1.
        tilt: t of tilted sampling, per nat; 0 is off. Negative values favour images that the classifier doubts.
        tilt_on: what is tilted: ``"log_prob"`` (the paper's) or ``"score"``.
        tilt_max: clip the tilt weights here; None for no clip.
        scale: s, multiplies the whole image gradient.
        sine_boost: γ of EluCD's boost γ·v_max·sin(πk/K) to the variance; DDPM only.
        interval: (lo, hi): guide only where lo < σ ≤ hi, σ = √((1−ᾱ)/ᾱ); None to guide everywhere.
        rule: ``"score"``: the image gradient is a part of the score that the sampler follows. ``"edm"``: EluCD's for
            EDM's Heun, see :mod:`calguide_fast.edm_rule`, which takes no more than the gradient's direction.
        max_guidance: m of EluCD's EDM rule, whose strength it sets in place of ``scale``: 0.004 for ImageNet-64.
        add_factor: a of EluCD's EDM rule, 0.3 there.

    Raises:
        TypeError, ValueError: at construction, for a setting of the wrong type or out of its range, and for one that
            has no effect: adaptive entropy of no weight, ``tilt_on`` or ``tilt_max`` without a tilt. (α and ε without
            a divergence are let be, and so is what belongs to the other rule.)
    """

    divergence: str = "js"
    alpha: float = 1.0
    epsilon: float = 0.9
    joint_temperature: float = 1.0
    marginal_temperature: float = 0.5
    entropy_weight: float = 0.0
    adaptive_entropy: bool = False
    entropy_scaling: float | None = None
    tilt: float = 0.0
    tilt_on: str = "log_prob"
    tilt_max: float | None = None
    scale: float = 1.0
    sine_boost: float = 0.0
    interval: tuple[float, float] | None = None
    rule: str = "score"
    max_guidance: float = 0.001
    add_factor: float = 0.0

    def __post_init__(self) -> None:
        self.settings  # noqa: B018 - checks the score's settings
        checks.number("scale", self.scale)
        checks.number("sine_boost", self.sine_boost, low=0.0)
        checks.number("tilt", self.tilt)
        if self.tilt_max is not None:
            checks.number("tilt_max", self.tilt_max, low=0.0)
        if self.tilt_on not in ("log_prob", "score"):
            raise ValueError(f"tilt_on={self.tilt_on!r} must be 'log_prob' or 'score'")
        if self.entropy_scaling is not None:
            checks.number("entropy_scaling", self.entropy_scaling, low=1.0)
        if self.interval is not None:
            self._check_interval()
        if self.rule not in ("score", "edm"):
            raise ValueError(f"rule={self.rule!r} must be 'score' or 'edm'")
        checks.number("max_guidance", self.max_guidance, low=0.0)
        checks.number("add_factor", self.add_factor)
        self._check_effects()

    def _check_interval(self) -> None:
        try:
            low, high = map(float, self.interval)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"interval={self.interval!r} must be a pair (lo, hi) of noise levels") from None
        # an infinite upper end is the natural way to say "from lo up"
        if not (0 <= low < high):
            raise ValueError(f"interval={self.interval!r} must be (lo, hi) with 0 <= lo < hi")
        object.__setattr__(self, "interval", (low, high))

    def _check_effects(self) -> None:
        """Refuse what was given and does nothing; a field at its default was not given.

        α and ε pass without a divergence, as "none" is what others are compared with in a grid; and so do the scale and
        the strengths of EluCD's rule without theirs, as they may be a preset's.
        """
        changed = self.changed()
        for name, needed in (("adaptive_entropy", "entropy_weight"), ("tilt_on", "tilt"), ("tilt_max", "tilt")):
            if name in changed and getattr(self, needed) == 0:
                raise ValueError(f"{name}={changed[name]!r} has no effect without {needed}, which is 0")

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def __repr__(self) -> str:
        changes = [f"{name}={value!r}" for name, value in self.changed().items() if name != "divergence"]
        return f"Guidance({', '.join([repr(self.divergence), *changes])})"

    @property
    def settings(self) -> Settings:
        return guidance_settings(
            self.divergence,
            self.alpha,
            self.epsilon,
            self.joint_temperature,
            self.marginal_temperature,
            self.entropy_weight,
            self.adaptive_entropy,
        )

    def guides_at(self, sigma: float) -> bool:
        """Whether the noise level σ lies in the interval."""
        return self.interval is None or self.interval[0] < sigma <= self.interval[1]

    def image_gradient(
        self, classifier: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, scratch: Scratch | None = None
    ) -> ImageGradient:
        """The gradient of the score at ``x``, by one forward and one backward pass of the classifier.

        Args:
            classifier: maps x to logits (B, num_classes); differentiable.
            x: (B, C, *spatial), the classifier's input.
            labels: (B,) int64.
            scratch: where the gradient of the logits may lie; in a tensor of its own if None.

        Returns:
            The gradient, of x's shape and dtype, without ``scale`` and tilt, and the scalars of each image.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = classifier(x)
        checks.floating("logits", logits)
        if not logits.requires_grad:
            raise ValueError("the classifier's logits do not depend differentiably on its input: is it under no_grad?")
        out = None if scratch is None else scratch.take("logit gradient", logits)
        logit_grad, stats = gradient_and_stats(logits.detach(), labels, self.settings, out)
        scalars = GuidanceStats(*stats.unbind(0))
        if self.entropy_scaling is not None:
            # the backward pass is linear, so that scaling the few logits scales the image gradient
            # one class has no entropy to speak of, and log C = 0: the ratio is 0 there, not 0/0
            normalised = scalars.entropy / max(math.log(logits.shape[1]), 1e-30)
            factor = normalised.reciprocal().clamp(max=self.entropy_scaling)
            logit_grad *= factor[:, None].to(logit_grad.dtype)
        (gradient,) = torch.autograd.grad(logits, x, logit_grad)
        return ImageGradient(gradient, scalars)

    def tilted(self, stats: GuidanceStats) -> Tensor | None:
        """The (B,) scores that tilt weights are taken of, or None if there is no tilt."""
        if self.tilt == 0.0:
            return None
        return stats.log_prob if self.tilt_on == "log_prob" else stats.score


SETTINGS = frozenset(field.name for field in fields(Guidance))
# what a classifier's logits are needed for, and a cond_fn shows none; temperatures may describe what the cond_fn does
OF_LOGITS = (
    "alpha",
    "epsilon",
    "entropy_weight",
    "adaptive_entropy",
    "entropy_scaling",
    "tilt",
    "tilt_on",
    "tilt_max",
)
