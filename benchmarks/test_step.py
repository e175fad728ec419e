"""What the sampler does around a classifier, against what one would write in PyTorch: DDPM with learned variance."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from torch import Tensor

from calguide_fast import guided_step, predict_x0, tilt_weights, use_backend
from calguide_fast.ops.noise import sampling_noise
from calguide_fast.schedule import Schedule

SHAPES = [(64, 1, 16, 16), (16, 3, 128, 128)]
SCALE, TILT = 0.7, -0.2
PEERS = ["eager", "torch.compile"]
COEFFICIENTS = Schedule.linear().respaced("250").coefficients()[100]
ROW = COEFFICIENTS.tolist()


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def by_shape(shapes: list[tuple[int, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", [pytest.param(shape, id=name(shape)) for shape in shapes])


by_peer = pytest.mark.parametrize(
    "peer", [pytest.param(peer, marks=[pytest.mark.smoke] * (peer == "eager")) for peer in PEERS]
)


def built(function: Callable[..., Tensor], peer: str) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False) if peer == "torch.compile" else function


def images(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x_t, the model's output, a gradient and noise."""
    generator = torch.Generator().manual_seed(0)
    x_t, gradient, z = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    output = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=generator).to(device, dtype)
    return x_t, output, gradient, z


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


@by_peer
@pytest.mark.parametrize("noise", ["given", "drawn"])
@by_shape(SHAPES)
def test_guided_step(compare, device, backend, shape: tuple[int, ...], noise: str, peer: str) -> None:
    x_t, output, gradient, z = images(shape, device)
    coefficients = COEFFICIENTS.to(device)
    seeds = torch.arange(shape[0], device=device)
    given = noise == "given"
    step = peers.ddpm_step(ROW, SCALE)
    drawn = z if given else sampling_noise(seeds, shape[1:], int(COEFFICIENTS[14]))
    expected = step(*double(x_t, output, gradient, drawn))

    def ours(x_t: Tensor, output: Tensor, gradient: Tensor, noise: Tensor, seeds: Tensor, out: Tensor) -> Tensor:
        source = {"noise": noise} if given else {"seeds": seeds}
        return guided_step(x_t, output, coefficients, gradient, scale=SCALE, **source, out=out)

    def drawing(x_t: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
        return step(x_t, output, gradient, torch.randn_like(x_t))

    function = built(step if given else drawing, peer)

    def other(x_t: Tensor, output: Tensor, gradient: Tensor, noise: Tensor, seeds: Tensor, out: Tensor) -> Tensor:
        return function(x_t, output, gradient, noise) if given else function(x_t, output, gradient)

    compare(
        f"guided_step {name(shape)}, noise {noise}, out={_of(backend, device)}",
        peer,
        other,
        ours,
        # as the sampler calls it; the peers have no such buffer to write to
        (x_t, output, gradient, z, seeds, torch.empty_like(x_t)),
        expected=expected,
        # the same formula with noise of another generator's
        same_result=given,
        rtol=1e-5,
        atol=1e-5,
        size=x_t.numel(),
        traffic=x_t.nbytes * (6 if given else 5),
        host=given and shape == SHAPES[0] and peer == "eager",
    )


@by_peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@by_shape(SHAPES)
def test_predict_x0(compare, device, backend, shape: tuple[int, ...], dtype: torch.dtype, peer: str) -> None:
    """In float32 from the model's output in either dtype."""
    x_t, output, *_ = images(shape, device, dtype)
    coefficients = COEFFICIENTS.to(device)
    predict = peers.clean_image(ROW)
    function = built(predict, peer)

    def ours(x_t: Tensor, output: Tensor, out: Tensor) -> Tensor:
        return predict_x0(x_t, output, coefficients, out=out)

    compare(
        f"predict_x0 {name(shape)}{', output bf16' * (dtype == torch.bfloat16)}, out={_of(backend, device)}",
        peer,
        lambda x_t, output, out: function(x_t, output),
        ours,
        (x_t, output, torch.empty_like(x_t)),
        expected=predict(*double(x_t, output)),
        # PyTorch multiplies bfloat16 by a number in bfloat16, and rounds
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
        size=x_t.numel(),
        traffic=2 * x_t.nbytes + output.nbytes // 2,
        host=dtype == torch.float32 and shape == SHAPES[0] and peer == "eager",
    )


@by_peer
@pytest.mark.parametrize("count", [16, 256, 4096])
def test_tilt_weights(compare, device, backend, count: int, peer: str) -> None:
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    function = built(peers.weights, peer)
    compare(
        f"tilt_weights {count}{_of(backend, device)}",
        peer,
        lambda scores: function(scores, TILT),
        lambda scores: tilt_weights(scores, TILT),
        (scores,),
        expected=peers.weights(scores.double(), TILT),
        size=count,
        traffic=2 * scores.nbytes,
        host=count == 16 and peer == "eager",
    )


@pytest.mark.smoke
@by_shape(SHAPES)
def test_sampling_noise(compare, device, backend, shape: tuple[int, ...]) -> None:
    """Against a generator that knows no images and no seeds of theirs."""
    seeds = torch.arange(shape[0], device=device)
    with use_backend("reference"):
        expected = sampling_noise(seeds, shape[1:], 1).double()
    compare(
        f"sampling_noise {name(shape)}{_of(backend, device)}",
        "torch.randn",
        lambda seeds: torch.randn(shape, device=device),
        lambda seeds: sampling_noise(seeds, shape[1:], 1),
        (seeds,),
        expected=expected,
        same_result=False,
        # to the last bit
        rtol=0.0,
        atol=0.0,
        size=expected.numel(),
        traffic=4 * expected.numel(),
        host=shape == SHAPES[0],
    )


def _of(backend: str, device: torch.device) -> str:
    return f" ({backend})" if device.type == "cuda" else ""
