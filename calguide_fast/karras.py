"""The noise levels that a solver in EDM's scaling visits, and what each of its steps multiplies by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calguide_fast.ops.checks import is_integer, number
from calguide_fast.schedule import Schedule

RHO = 7.0
# where EDM's samplers begin and end, as far as the model goes there
SIGMA_RANGE = (0.002, 80.0)
MOST_CHURN = math.sqrt(2) - 1


def as_range(sigma_range: Any) -> tuple[float | None, float | None]:
    """The ends that are asked for; None for what EDM and the model allow."""
    if sigma_range is None:
        return None, None
    try:
        low, high = (None if end is None else float(end) for end in sigma_range)
    except (TypeError, ValueError):
        raise ValueError(f"sigma_range={sigma_range!r} must be a pair of noise levels, the lowest first") from None
    return low, high


def within(low: float, high: float, asked: tuple[float | None, float | None]) -> tuple[float, float]:
    """The noise levels to sample between: as asked, within the model's low..high; else EDM's, as far as those go."""
    first = max(low, SIGMA_RANGE[0]) if asked[0] is None else asked[0]
    last = min(high, SIGMA_RANGE[1]) if asked[1] is None else asked[1]
    if asked != (None, None) and not low <= first < last <= high:
        raise ValueError(f"sigma_range={(first, last)!r} must rise, and lie within the model's range, {low}..{high}")
    return first, last


class Level(IntEnum):
    """What is needed to evaluate a guided denoiser at one noise level."""

    SIGMA = 0  # σ
    TIMESTEP = 1  # of the schedule, fractional
    SHRINK = 2  # 1/√(1+σ²), from EDM's x to the x_t of a discrete process
    PUSH = 3  # σ²/√(1+σ²), what an image gradient at x_t adds to the denoised image


class Solve(IntEnum):
    """Further columns of the float32 table; σ̂ is the noise level after churn, σ' that of the next step, 0 at last."""

    WAY = 8  # 1 − σ'/σ̂, the part of the way to the denoised image that a step goes
    CHURN = 9  # S_noise √(σ̂² − σ²), what noise is multiplied by
    HALF_STEP = 10  # ½ (σ' − σ̂)/σ', of Heun's correction; 0 at last, where there is none
    EXTRAPOLATION = 11  # −1/(2r) of DPM-Solver++(2M); 0 at the first step and at the last
    DECREASE = 12  # 1 − i/(K+1), i counting steps from 0: EluCD's rule
    SINE = 13  # sin(πi/K): EluCD's rule


ROW_LENGTH = 14


@dataclass(frozen=True)
class Churn:
    """EDM's stochasticity: each step begins with γσ more noise, γ = min(S_churn/K, √2 − 1) where S_tmin ≤ σ ≤ S_tmax.

    Attributes:
        churn: S_churn; 0, the deterministic sampler, by default.
        s_tmin: S_tmin.
        s_tmax: S_tmax.
        s_noise: S_noise, the standard deviation of the noise that is added.

    Raises:
        TypeError, ValueError: at construction, for what is no number or negative, and s_tmin above s_tmax.
    """

    churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        number("churn", self.churn, low=0.0)
        number("s_tmin", self.s_tmin, low=0.0)
        number("s_noise", self.s_noise, low=0.0)
        # an infinite upper end is the natural way to say "from s_tmin up"
        if self.s_tmax != math.inf:
            number("s_tmax", self.s_tmax, low=0.0)
        if self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin={self.s_tmin!r} must not be above s_tmax={self.s_tmax!r}: there is no σ between")

    def applied(self, sigmas: np.ndarray) -> np.ndarray:
        """(K,) the noise levels σ̂ = (1 + γ) σ."""
        gamma = min(self.churn / max(len(sigmas), 1), MOST_CHURN)
        return sigmas * np.where((self.s_tmin <= sigmas) & (sigmas <= self.s_tmax), 1 + gamma, 1.0)


@dataclass(frozen=True, eq=False)
class KarrasLevels:
    """The K noise levels that a solver visits, from k = K−1 down to 0, and from there to 0.

    Attributes:
        sigmas: (K,) float64, rising, above 0, in EDM's units: noise per unit of signal.
        evaluated: (K,) float64, σ̂: where the model is first evaluated, after churn.
        schedule: of the model, to tell the timesteps by.
        s_noise: standard deviation of churn's noise.
    """

    sigmas: np.ndarray
    evaluated: np.ndarray
    schedule: Schedule
    s_noise: float = 1.0

    @classmethod
    def karras(
        cls, count: int | str, low: float, high: float, schedule: Schedule, churn: Churn | None = None
    ) -> KarrasLevels:
        """K levels between two, evenly spaced in σ^(1/ρ), ρ = 7 (Karras et al., arXiv 2206.00364, equation 5).

        Args:
            count: K, at least 1; one level is ``high``.
            low: the last level above 0.
            high: the first.
            schedule: of the model.
            churn: EDM's stochasticity; none if None.

        Raises:
            ValueError: a count that is no integer or below 1; levels that are not 0 < low < high.
        """
        if not is_integer(count) or count < 1:
            raise ValueError(f"steps={count!r} must be an integer, at least 1: how many noise levels to visit")
        if not 0 < low < high < math.inf:
            raise ValueError(f"the noise levels from {low!r} to {high!r} must be finite, above 0 and rising")
        churn = Churn() if churn is None else churn
        place = np.linspace(0, 1, count) if count > 1 else np.ones(1)
        sigmas = (low ** (1 / RHO) + place * (high ** (1 / RHO) - low ** (1 / RHO))) ** RHO
        return cls(sigmas, churn.applied(sigmas), schedule, churn.s_noise)

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def timesteps(self) -> np.ndarray:
        """(K,) float64, the schedule's fractional timesteps, rising."""
        return self.schedule.timesteps_at(self.sigmas)

    def renoising(self, k: int) -> tuple[float, float]:
        """a and b of x_k = a x_{k−1} + b z, the forward process from after step k back to before it."""
        following = self.sigmas[k - 1] if k else 0.0
        return 1.0, math.sqrt(self.sigmas[k] ** 2 - following**2)

    def table(self) -> Tensor:
        """The table that the solvers read, one row for each k.

        Returns:
            (K, 14) float32, computed in float64: the columns of :class:`Level` at σ̂, those at σ', then :class:`Solve`.
        """
        count, hat = len(self), self.evaluated
        following = np.append(0.0, self.sigmas[:-1])
        index = np.arange(count)[::-1]
        table = np.zeros((count, ROW_LENGTH))
        table[:, :4] = self._levels(hat)
        table[1:, 4:8] = self._levels(following[1:])
        table[:, Solve.WAY] = 1 - following / hat
        table[:, Solve.CHURN] = self.s_noise * np.sqrt(np.maximum(hat**2 - self.sigmas**2, 0))
        table[1:, Solve.HALF_STEP] = 0.5 * (following[1:] - hat[1:]) / following[1:]
        # steps in −log σ, of which r is the last one's length by this one's
        lengths = np.log(self.sigmas[1:] / self.sigmas[:-1])
        table[1:-1, Solve.EXTRAPOLATION] = -0.5 * lengths[:-1] / lengths[1:]
        table[:, Solve.DECREASE] = 1 - index / (count + 1)
        table[:, Solve.SINE] = np.sin(math.pi * index / count)
        return torch.from_numpy(table).float()

    def _levels(self, sigmas: np.ndarray) -> np.ndarray:
        """(K, 4): the columns of :class:`Level`."""
        shrink = 1 / np.sqrt(1 + sigmas**2)
        return np.stack([sigmas, self.schedule.timesteps_at(sigmas), shrink, sigmas**2 * shrink], 1)
