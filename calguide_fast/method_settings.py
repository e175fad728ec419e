"""Settings that some methods of sampling, or ways of guiding, have and others would leave without effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from calguide_fast.guidance import OF_LOGITS, Guidance
from calguide_fast.karras import Churn
from calguide_fast.schedule import VARIANCES


def check_method_settings(
    method: str, eta: float, churn: Churn, sigma_range: Sequence[float | None], variance: str = VARIANCES[0]
) -> None:
    """Refuse what was asked for and would do nothing.

    Args:
        method: of sampling.
        eta: η of DDIM; 0 asks for nothing.
        churn: EDM's stochasticity; its defaults ask for nothing.
        sigma_range: the lowest and the highest noise level; None asks for nothing.
        variance: of DDPM's steps; the default asks for nothing.

    Raises:
        ValueError: a setting that the method, or a churn of 0, leaves without effect.
    """
    default = asdict(Churn())
    changed = {name: value for name, value in asdict(churn).items() if value != default[name]}
    asked: list[tuple[str, object, tuple[str, ...]]] = [(name, value, ("heun",)) for name, value in changed.items()]
    if eta:
        asked.append(("eta", eta, ("ddim",)))
    if variance != VARIANCES[0]:
        asked.append(("variance", variance, ("ddpm",)))
    if any(end is not None for end in sigma_range):
        asked.append(("sigma_range", tuple(sigma_range), ("heun", "dpmpp")))
    for name, value, methods in asked:
        if method not in methods:
            needed = " or ".join(map(repr, methods))
            raise ValueError(f"{name}={value!r} has no effect with method={method!r}: it needs {needed}")
    if changed and not churn.churn:
        name, value = next(iter(changed.items()))
        raise ValueError(f"{name}={value!r} has no effect without churn, which is 0")


def check_cond_fn_settings(guidance: Guidance) -> None:
    """Refuse settings of guidance that do nothing where a ``cond_fn`` gives the gradient itself.

    Raises:
        ValueError: a setting of what is made of a classifier's logits.
    """
    changed = guidance.changed()
    # "none" says what is so
    names = [name for name in OF_LOGITS if name in changed]
    if changed.get("divergence", "none") != "none":
        names.insert(0, "divergence")
    if names:
        raise ValueError(
            f"{names[0]}={changed[names[0]]!r} has no effect with a cond_fn, which gives the gradient and shows no "
            "logits: it needs a classifier"
        )


def check_batch_size(guidance: Guidance | None, batch_size: int) -> None:
    """Refuse a tilt over batches of one image, whose weight is 1.

    Raises:
        ValueError: there is a tilt, and batch_size is 1.
    """
    if batch_size == 1 and guidance is not None and guidance.tilt:
        raise ValueError(
            f"tilt={guidance.tilt!r} has no effect with batch_size={batch_size}: it weighs the images of a batch "
            "against each other"
        )
