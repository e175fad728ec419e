"""The ways of guiding that the demo compares, and the scales that each may choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from calguide_fast.demo.networks import NULL_CLASS
from calguide_fast.guidance import Guidance


@dataclass(frozen=True)
class Method:
    """One way of sampling; `strength` is the guidance scale, or w of classifier-free guidance."""

    name: str  # names files
    title: str  # names rows
    formula: str
    guidance: Guidance | None = None
    overconfident: bool = False  # guide with the overconfident twin
    strength: float | None = None
    strengths: tuple[float, ...] = ()  # what a sweep tries

    def at(self, strength: float) -> Method:
        """The same method at another strength."""
        return replace(self, strength=strength)

    def sampler_settings(self) -> dict[str, Any]:
        """Keywords for the sampler."""
        if self.strength is None:
            return {"guidance": None}
        if self.guidance is None:
            return {"guidance": None, "cfg_scale": self.strength, "null_class": NULL_CLASS}
        return {"guidance": replace(self.guidance, scale=self.strength)}


# six strengths for every method, a factor of two apart for scales, around where each works: none is tuned more than
# another. At τ₂=1 the gradient is soon some twenty times smaller, with the overconfident twin some four times larger
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
SCALES_SATURATING = tuple(20 * scale for scale in SCALES)
SCALES_OVERCONFIDENT = tuple(scale / 4 for scale in SCALES)
SCALES_SATURATING_OVERCONFIDENT = tuple(5 * scale for scale in SCALES)
CFG_WEIGHTS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

ADM_G = Guidance("none", marginal_temperature=1.0)
ELUCD = Guidance("none", marginal_temperature=0.5, sine_boost=0.3)
ALPHA, EPSILON = 3.0, 0.9
TILT, TILT_MAX = -0.2, 3.0
ENTROPY_WEIGHT = 0.5


def _divergence(name: str) -> Guidance:
    return replace(ELUCD, divergence=name, alpha=ALPHA, epsilon=EPSILON)


# strengths are those of the lowest Fréchet distance to the *training* digits in the sweep of `--full`
METHODS = (
    Method("unguided", "Unguided", "conditional model alone"),
    Method("cfg", "Classifier-free", "no classifier", strength=2.0, strengths=CFG_WEIGHTS),
    Method("adm_g", "ADM-G", "log p, τ₂=1", ADM_G, strength=8.0, strengths=SCALES_SATURATING),
    Method("elucd", "EluCD", "log p, τ₂=½", ELUCD, strength=0.2, strengths=SCALES),
    Method("reverse_kl", "Reverse KL", "EluCD − 3·KL(q‖p)", _divergence("reverse_kl"), strength=0.2, strengths=SCALES),
    Method("forward_kl", "Forward KL", "EluCD − 3·KL(p‖q)", _divergence("forward_kl"), strength=0.2, strengths=SCALES),
    Method("js", "Jensen–Shannon", "EluCD − 3·JS(q, p)", _divergence("js"), strength=0.2, strengths=SCALES),
    Method(
        "tilted",
        "Tilted",
        f"EluCD, t = −{-TILT}",
        replace(ELUCD, tilt=TILT, tilt_max=TILT_MAX),
        strength=0.2,
        strengths=SCALES,
    ),
    Method(
        "entropy",
        "Entropy",
        f"EluCD + adaptive {ENTROPY_WEIGHT}·H(p)",
        replace(ELUCD, entropy_weight=ENTROPY_WEIGHT, adaptive_entropy=True),
        strength=0.2,
        strengths=SCALES,
    ),
    Method(
        "adm_g_overconfident",
        "ADM-G, overconfident",
        "log p, τ₂=1",
        ADM_G,
        overconfident=True,
        strength=8.0,
        strengths=SCALES_SATURATING_OVERCONFIDENT,
    ),
    Method(
        "elucd_overconfident",
        "EluCD, overconfident",
        "log p, τ₂=½",
        ELUCD,
        overconfident=True,
        strength=0.2,
        strengths=SCALES_OVERCONFIDENT,
    ),
    Method(
        "js_overconfident",
        "JS, overconfident",
        "EluCD − 3·JS(q, p)",
        _divergence("js"),
        overconfident=True,
        strength=0.2,
        strengths=SCALES_OVERCONFIDENT,
    ),
)


def _term(divergence: str = "none", alpha: float = 0.0, **settings: Any) -> Guidance:
    return Guidance(divergence, alpha=alpha, epsilon=EPSILON, **settings)


# log p vanishes where both temperatures are 0, which leaves one term by itself
_ALONE: dict[str, Any] = {"joint_temperature": 0.0, "marginal_temperature": 0.0}
TERMS = {
    "log p, τ₂=1": _term(marginal_temperature=1.0),
    "log p, τ₂=½": _term(marginal_temperature=0.5),
    "reverse KL": _term("reverse_kl", 1.0, **_ALONE),
    "forward KL": _term("forward_kl", 1.0, **_ALONE),
    "Jensen–Shannon": _term("js", 1.0, **_ALONE),
    "entropy": _term(entropy_weight=1.0, **_ALONE),
}
