"""What a GPU is asked to reach: the ops at sizes that fill one, the bytes and launches each takes, and what to expect.

`predicted_us` are of an H200 and were written down before anything was measured; benchmarks/results/gpu-predictions.md
says how they come about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peers import ALPHA, EPSILON, TAU
from torch import Tensor

from calguide_fast import guidance_gradient, guided_step, smooth_ece
from calguide_fast.schedule import Schedule

COEFFICIENTS = Schedule.linear().respaced("250").coefficients()[100]
SCALE = 0.7
SHARE = 0.85


@dataclass(frozen=True)
class Target:
    """One op at one size.

    Attributes:
        name: of the row.
        inputs: makes the tensors of a call, on a device.
        call: the op, of these.
        elements: of the input.
        traffic: bytes that a call must read and write.
        launches: kernels of the CUDA backend in a call.
        predicted_us: (CUDA, Triton), as replayed by a graph or in a long row of calls.
        most_us: the aim where the launch is most of it.
        share: the aim where memory is: of the bandwidth of a copy of as many bytes.
    """

    name: str
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    call: Callable[..., Any]
    elements: int
    traffic: int
    launches: int
    predicted_us: tuple[float, float]
    most_us: float | None = None
    share: float | None = None

    @property
    def op(self) -> str:
        return self.name.split()[0]


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def rows(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and where the gradient goes: as the sampler calls it."""
    source = generator(device)
    logits = torch.empty(shape, device=device).normal_(0, 3, generator=source)
    labels = torch.randint(shape[1], shape[:1], generator=source, device=device)
    return logits, labels, torch.empty_like(logits)


def gradient(divergence: str, logits: Tensor, labels: Tensor, out: Tensor) -> Any:
    return guidance_gradient(logits, labels, divergence, ALPHA, EPSILON, 1.0, TAU, out=out)


def images(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """x_t, the model's output, a gradient, seeds, the step's coefficients, and where the next x_t goes."""
    source = generator(device)
    x_t, gradient = (torch.empty(shape, device=device).normal_(generator=source) for _ in range(2))
    output = torch.empty((shape[0], 2 * shape[1], *shape[2:]), device=device).normal_(generator=source)
    seeds = torch.arange(shape[0], device=device)
    return x_t, output, gradient, seeds, COEFFICIENTS.to(device), torch.empty_like(x_t)


def drawn_step(
    x_t: Tensor, output: Tensor, gradient: Tensor, seeds: Tensor, coefficients: Tensor, out: Tensor
) -> Tensor:
    return guided_step(x_t, output, coefficients, gradient, scale=SCALE, seeds=seeds, out=out)


def outcomes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Confidences of an overconfident classifier, and whether it was right."""
    source = generator(device)
    confidence = torch.rand(count, generator=source, device=device)
    return confidence, torch.rand(count, generator=source, device=device) < confidence**1.3


def value(confidence: Tensor, correct: Tensor) -> Tensor:
    return smooth_ece(confidence, correct).value


def guidance_target(
    divergence: str, shape: tuple[int, int], predicted_us: tuple[float, float], most_us: float | None = None
) -> Target:
    elements = shape[0] * shape[1]
    name = f"guidance {divergence} {shape[0]}x{shape[1]}"
    call = partial(gradient, divergence)
    share = None if most_us else SHARE
    return Target(name, partial(rows, shape), call, elements, 8 * elements, 1, predicted_us, most_us, share)


def step_target(shape: tuple[int, ...], predicted_us: tuple[float, float]) -> Target:
    elements = torch.Size(shape).numel()
    name = f"guided_step {'x'.join(map(str, shape))}, noise drawn"
    # x_t, eps, v and the gradient in, the next x_t out
    return Target(name, partial(images, shape), drawn_step, elements, 20 * elements, 1, predicted_us, share=SHARE)


def smooth_ece_target(count: int, predicted_us: tuple[float, float]) -> Target:
    return Target(f"smooth_ece {count}", partial(outcomes, count), value, count, 5 * count, 4, predicted_us)


TARGETS = [
    guidance_target("reverse_kl", (256, 1000), (3.0, 6.0), most_us=5.0),
    guidance_target("js", (256, 1000), (4.0, 8.0), most_us=5.0),
    guidance_target("reverse_kl", (65536, 1000), (145, 220)),
    guidance_target("js", (65536, 1000), (190, 380)),
    guidance_target("reverse_kl", (4096, 21841), (260, 420)),
    guidance_target("js", (4096, 21841), (470, 650)),
    step_target((64, 3, 128, 128), (19, 24)),
    step_target((256, 3, 256, 256), (290, 350)),
    smooth_ece_target(100_000, (100, 200)),
    smooth_ece_target(1_000_000, (105, 210)),
    smooth_ece_target(10_000_000, (180, 400)),
    smooth_ece_target(100_000_000, (900, 2500)),
]
