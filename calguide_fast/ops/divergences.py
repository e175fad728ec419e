"""The table of divergences: their names, the codes that kernels switch on, and where they are finite."""

from __future__ import annotations

import math

# name -> code; the same numbers stand in csrc/fdiv_math.h
CODES = {
    "none": 0,
    "reverse_kl": 1,
    "forward_kl": 2,
    "js": 3,
    "jeffreys": 4,
    "hellinger": 5,
    "chi2": 6,
    "neyman_chi2": 7,
    "alpha": 8,
}

# divergences that are infinite when the target distribution has zeros, as it does at epsilon = 1
_INFINITE_ON_ZEROS = {CODES["forward_kl"], CODES["jeffreys"], CODES["chi2"]}


def parse_divergence(name: str) -> tuple[int, float]:
    """Turn a divergence's name into ``(code, order)``; ``order`` is a for ``"alpha:a"`` and 0.0 otherwise.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is not in the table, or the order of ``"alpha:a"`` is not a finite number.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"divergence must be a name, such as 'js', got {type(name).__name__}; of an object that holds settings, "
            "as a Guidance does, give the fields one by one (divergence=…, alpha=…), or call its image_gradient"
        )
    if name.startswith("alpha:"):
        return _parse_order(name)
    if name in CODES and name != "alpha":
        return CODES[name], 0.0
    known = ", ".join(repr(known) for known in CODES if known != "alpha")
    raise ValueError(f"divergence={name!r} is not known; choose one of {known} or 'alpha:a' with a number a")


def _parse_order(name: str) -> tuple[int, float]:
    text = name.removeprefix("alpha:")
    try:
        order = float(text)
    except ValueError:
        order = math.nan
    if not math.isfinite(order):
        raise ValueError(f"divergence={name!r}: the order after 'alpha:' must be a finite number, got {text!r}")
    # the two limits of the Cressie-Read family, where its formula is 0/0
    if order == 1.0:
        return CODES["forward_kl"], 0.0
    if order == 0.0:
        return CODES["reverse_kl"], 0.0
    return CODES["alpha"], order


def infinite_on_zeros(code: int, order: float) -> bool:
    """Whether D(q‖p) is infinite for a target q with zeros (epsilon = 1)."""
    return code in _INFINITE_ON_ZEROS or (code == CODES["alpha"] and order >= 1.0)
