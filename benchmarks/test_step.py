"""guided_step against what one would write in PyTorch: DDPM with learned variance, fp32."""

from __future__ import annotations

import pytest
import torch
from peers import ddpm_step, ddpm_step_drawing

from calguide_fast import guided_step
from calguide_fast.schedule import Schedule

SHAPES = [(64, 1, 16, 16), (16, 3, 128, 128)]
SCALE = 0.7
# noise -> peer -> floor for each shape
FLOORS = {
    "given": {"eager": (40, 12), "torch.compile": (8, 3.5)},
    "drawn": {"eager": (10, 5), "torch.compile": (None, None)},
}


def cases() -> list:
    return [
        pytest.param(
            shape,
            noise,
            peer,
            id=f"{'x'.join(map(str, shape))}-noise_{noise}-{peer}",
            marks=[pytest.mark.smoke] if peer == "eager" else [],
        )
        for shape in SHAPES
        for noise in FLOORS
        for peer in FLOORS[noise]
    ]


@pytest.mark.parametrize(("shape", "noise", "peer"), cases())
def test_guided_step(compare, shape: tuple[int, ...], noise: str, peer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    x_t, gradient, z = (torch.randn(shape, generator=generator) for _ in range(3))
    model_output = torch.randn((shape[0], 2 * channels, *shape[2:]), generator=generator)
    coefficients = Schedule.linear().respaced("250").coefficients()[100]
    seeds = torch.arange(shape[0])
    # as the sampler calls it; the peers have no such buffer to write to
    out = torch.empty_like(x_t)
    row = coefficients.tolist()

    def with_given_noise():
        return guided_step(x_t, model_output, coefficients, gradient, scale=SCALE, noise=z, out=out)

    step = ddpm_step(row, SCALE)
    torch.testing.assert_close(step(x_t, model_output, gradient, z), with_given_noise(), rtol=1e-5, atol=1e-5)

    if noise == "given":
        inputs, ours = (x_t, model_output, gradient, z), with_given_noise
    else:
        step, inputs = ddpm_step_drawing(row, SCALE), (x_t, model_output, gradient)

        def ours():
            return guided_step(x_t, model_output, coefficients, gradient, scale=SCALE, seeds=seeds, out=out)

    if peer == "torch.compile":
        step = torch.compile(step, fullgraph=True, dynamic=False)
    group = f"guided_step {'x'.join(map(str, shape))}, noise {noise}, out="
    compare(group, peer, lambda: step(*inputs), ours, FLOORS[noise][peer][SHAPES.index(shape)], x_t.numel())
