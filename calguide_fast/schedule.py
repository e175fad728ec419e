"""Noise schedules, respacing and the per-step coefficients of the reverse process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calguide_fast.ops.checks import number
from calguide_fast.ops.coefficients import ROW_LENGTH, Coefficient

VARIANCES = ("fixed_small", "fixed_large")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process q(x_t | x_0) = N(√ᾱ_t x_0, 1−ᾱ_t) that a model was trained on.

    Attributes:
        alphas_cumprod: (T,) float64, ᾱ_t, falling.
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self) -> None:
        table = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod has shape {table.shape}; it must be (T,) with T at least 1")
        if not ((table > 0) & (table < 1)).all() or not (np.diff(table) < 0).all():
            raise ValueError("alphas_cumprod must fall strictly and lie between 0 and 1")
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def linear(cls, num_timesteps: int = 1000) -> Schedule:
        """β from 1e-4 to 0.02, scaled by 1000/T (Ho et al., arXiv 2006.11239)."""
        scale = 1000 / _positive("num_timesteps", num_timesteps)
        return cls.from_betas(np.linspace(scale * 1e-4, scale * 0.02, num_timesteps))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> Schedule:
        """ᾱ = cos²((t/T + 0.008)/1.008·π/2), with β at most 0.999 (Nichol & Dhariwal, arXiv 2102.09672)."""
        time = np.arange(_positive("num_timesteps", num_timesteps) + 1) / num_timesteps
        level = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - level[1:] / level[:-1], 0.999))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> Schedule:
        """The schedule with the given β_t, (T,), each between 0 and 1."""
        return cls(np.cumprod(1 - np.asarray(betas, dtype=np.float64), axis=-1))

    @classmethod
    def of(cls, schedule: str | Schedule | Sequence[float] | np.ndarray | Tensor) -> Schedule:
        """``"linear"``, ``"cosine"``, a schedule, or the (T,) β table of one."""
        if isinstance(schedule, Schedule):
            return schedule
        if isinstance(schedule, str):
            if schedule not in ("linear", "cosine"):
                raise ValueError(f"schedule={schedule!r} must be 'linear', 'cosine', a Schedule or a table of betas")
            return cls.linear() if schedule == "linear" else cls.cosine()
        return cls.from_betas(schedule.cpu().numpy() if isinstance(schedule, Tensor) else schedule)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> np.ndarray:
        """(T,) noise levels σ = √((1−ᾱ)/ᾱ), rising, in EDM's units: noise per unit of signal."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    def timesteps_at(self, sigmas: np.ndarray) -> np.ndarray:
        """Fractional timesteps of noise levels in EDM's units, interpolated in log σ; the ends' beyond the range."""
        logs, wanted = (torch.from_numpy(np.log(levels)) for levels in (self.sigmas, sigmas))
        return fractional_index(logs, wanted).numpy()

    def respaced(self, steps: str | int) -> Timeline:
        """Keep some of the timesteps, in OpenAI's notation; β is recomputed from the kept ᾱ.

        Args:
            steps: ``"250"`` or 250 keeps 250 timesteps evenly spaced from first to last; ``"10,15,20"`` cuts the
                process into three equal sections and keeps so many of each; ``"ddim25"`` strides evenly from 0.

        Raises:
            ValueError: the notation is not understood, or asks for more steps than there are.
        """
        kept = np.array(spaced_timesteps(self.num_timesteps, steps))
        return Timeline(kept, self.alphas_cumprod[kept])


def fractional_index(table: Tensor, x: Tensor) -> Tensor:
    """Where x lies in a (T,) table that rises: the index there, linear between two entries; the ends' beyond them.

    In the precision of the two, on their device, which is not waited for.
    """
    if len(table) == 1:
        return torch.zeros_like(x)
    below = (torch.searchsorted(table, x, right=True) - 1).clamp(0, len(table) - 2)
    low, high = table[below], table[below + 1]
    return below + ((x - low) / (high - low)).clamp(0, 1)


def spaced_timesteps(num_timesteps: int, steps: str | int) -> list[int]:
    """The timesteps that OpenAI's respacing notation keeps, rising. See :meth:`Schedule.respaced`."""
    text = str(steps)
    counts = text.removeprefix("ddim").split(",")
    if isinstance(steps, bool) or not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise ValueError(f"steps={steps!r} must be a positive count, counts like '10,15,20', or 'ddimN'")
    numbers = [int(count) for count in counts]
    if text.startswith("ddim"):
        return _strided(num_timesteps, numbers, text)
    kept = []
    start = 0
    for section, count in enumerate(numbers):
        size = num_timesteps // len(numbers) + (section < num_timesteps % len(numbers))
        if count > size:
            raise ValueError(f"steps={steps!r} asks for {count} timesteps of a section that has {size}")
        # the stride is added up in floating point, as OpenAI does, so that ties round the same way
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _strided(num_timesteps: int, numbers: list[int], text: str) -> list[int]:
    if len(numbers) == 1:
        for stride in range(1, num_timesteps + 1):
            kept = range(0, num_timesteps, stride)
            if len(kept) == numbers[0]:
                return list(kept)
    raise ValueError(f"steps={text!r}: no whole stride keeps exactly so many of {num_timesteps} timesteps")


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    return value


@dataclass(frozen=True, eq=False)
class Timeline:
    """The K timesteps that a sampler visits, from k = K−1 down to 0.

    Attributes:
        timesteps: (K,) the original integer timesteps, rising.
        alphas_cumprod: (K,) float64, their ᾱ.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> np.ndarray:
        """(K,) noise levels σ = √((1−ᾱ)/ᾱ), in EDM's units: noise per unit of signal."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @property
    def evaluated(self) -> np.ndarray:
        """(K,) noise levels at which the model is called: :attr:`sigmas`."""
        return self.sigmas

    def renoising(self, k: int) -> tuple[float, float]:
        """a and b of x_k = a x_{k−1} + b z, the forward process from after step k back to before it."""
        kept = self.alphas_cumprod[k] / (self.alphas_cumprod[k - 1] if k else 1.0)
        return math.sqrt(kept), math.sqrt(1 - kept)

    def coefficients(self, variance: str = "fixed_small", eta: float = 0.0) -> Tensor:
        """The table that :func:`calguide_fast.guided_step` reads, one row for each k.

        Args:
            variance: of a model that predicts none: ``"fixed_small"`` is the posterior's β̃ (guidance at the last step
                is then multiplied by 0, as in OpenAI's sampler), ``"fixed_large"`` is β.
            eta: η of DDIM, 0 for the deterministic sampler, 1 for DDPM's variance.

        Returns:
            (K, 16) float32, computed in float64; the columns are those of ``ops.coefficients.Coefficient``.

        Raises:
            ValueError: an unknown variance, or η that is negative or so large that 1−ᾱ₋−σ² is.
        """
        if variance not in VARIANCES:
            raise ValueError(f"variance={variance!r} must be one of {', '.join(map(repr, VARIANCES))}")
        eta = number("eta", eta, low=0.0)
        count = len(self)
        bar = self.alphas_cumprod
        bar_prev = np.append(1.0, bar[:-1])
        betas = 1 - bar / bar_prev
        posterior_variance = betas * (1 - bar_prev) / (1 - bar)
        # the posterior's variance is 0 at the first step, where its log is taken from the second
        clipped = np.append(posterior_variance[1:2] if count > 1 else betas, posterior_variance[1:])
        fixed_variance, fixed_variance_of_noise = {
            "fixed_small": (posterior_variance, clipped),
            "fixed_large": (np.append(clipped[0], betas[1:]),) * 2,
        }[variance]
        ddim_variance = eta**2 * (1 - bar_prev) / (1 - bar) * betas
        direction = 1 - bar_prev - ddim_variance
        if (direction < -1e-12).any():
            raise ValueError(f"eta={eta!r} is too large: DDIM's sigma² exceeds 1−ᾱ of the step before")
        index = np.arange(count)

        table = np.empty((count, ROW_LENGTH))
        table[:, Coefficient.SQRT_RECIP_ALPHAS_CUMPROD] = np.sqrt(1 / bar)
        table[:, Coefficient.SQRT_RECIPM1_ALPHAS_CUMPROD] = np.sqrt(1 / bar - 1)
        table[:, Coefficient.POSTERIOR_MEAN_X0] = betas * np.sqrt(bar_prev) / (1 - bar)
        table[:, Coefficient.POSTERIOR_MEAN_XT] = (1 - bar_prev) * np.sqrt(1 - betas) / (1 - bar)
        table[:, Coefficient.LOG_VARIANCE_MAX] = np.log(betas)
        table[:, Coefficient.LOG_VARIANCE_MIN] = np.log(clipped)
        table[:, Coefficient.FIXED_VARIANCE] = fixed_variance
        table[:, Coefficient.FIXED_NOISE_SCALE] = np.sqrt(fixed_variance_of_noise)
        table[:, Coefficient.SQRT_ALPHAS_CUMPROD_PREV] = np.sqrt(bar_prev)
        table[:, Coefficient.DDIM_DIRECTION] = np.sqrt(np.maximum(direction, 0))
        table[:, Coefficient.DDIM_SIGMA] = np.sqrt(ddim_variance)
        table[:, Coefficient.SQRT_ONE_MINUS_ALPHAS_CUMPROD] = np.sqrt(1 - bar)
        table[:, Coefficient.SINE] = np.sin(math.pi * index / count)
        table[:, Coefficient.HAS_NOISE] = index > 0
        table[:, Coefficient.DRAW] = count - index
        table[:, Coefficient.TIMESTEP] = self.timesteps
        return torch.from_numpy(table).float()
