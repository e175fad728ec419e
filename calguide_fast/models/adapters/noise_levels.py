"""The noise levels of a schedule, between its timesteps too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calguide_fast.schedule import Schedule, fractional_index


class NoiseLevels:
    """σ_t = √((1−ᾱ_t)/ᾱ_t) of each timestep, and back; log σ is linear in t between two timesteps.

    The tables follow their input from device to device, and stay float32 whatever a module around them is cast to.

    Args:
        schedule: of at least two timesteps.

    Source: the interpolation is k-diffusion's, after Karras et al., arXiv 2206.00364, appendix C.3.
    """

    def __init__(self, schedule: Schedule) -> None:
        if schedule.num_timesteps < 2:
            raise ValueError("schedule must have at least two timesteps to interpolate between")
        sigmas = schedule.sigmas
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self._last = len(sigmas) - 1
        # [2, T]: σ and log σ, both rounded from float64
        table = torch.from_numpy(np.stack([sigmas, np.log(sigmas)])).float()
        # none is ever let go: a CUDA graph that was recorded with one goes on reading it
        self._tables = {table.device: table}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) float32 σ of timesteps (B,), integers or any numbers from 0 to T−1 (others count as the nearer end)."""
        sigmas, logs = self._table(t.device)
        if not t.is_floating_point():
            return sigmas[t]
        t = t.float().clamp(0, self._last)
        below = t.long().clamp(max=self._last - 1)
        return torch.lerp(logs[below], logs[below + 1], t - below).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """(B,) float32 t of noise levels (B,); beyond the schedule's range its nearer end."""
        _, logs = self._table(sigma.device)
        return fractional_index(logs, sigma.float().log())


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) values in a shape that multiplies (B, C, *spatial) images."""
    return values.view(-1, *[1] * (images.ndim - 1))


def widened(images: Tensor) -> Tensor:
    """At least float32: differences of half-precision images lose what a sampler multiplies by σ."""
    return images.to(torch.promote_types(images.dtype, torch.float32))
