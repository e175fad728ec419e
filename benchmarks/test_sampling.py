"""Whole sampling: FDivSampler against an eager loop, and where the time of a guided step goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import pytest
import torch
from loops import EagerDiffusion, drawn, gradient_of
from timing import clock_of, interleaved, shares_within
from torch import Tensor, nn

from calguide_fast import FDivSampler, Guidance, guidance_gradient, guided_step, predict_x0
from calguide_fast.demo.checkpoints import load_guide, load_unet
from calguide_fast.models import UNet, resnet18
from calguide_fast.schedule import Schedule


class Networks(NamedTuple):
    model: nn.Module
    classifier: nn.Module
    images: int
    steps: int
    scale: float


# images of the demo's, and steps: enough of them to fill the machine, and so few that what is around the networks shows
DIGITS = {"digits": (64, 5), "few digits": (2, 20)}


@functools.cache
def networks(name: str, device: torch.device) -> Networks:
    if name in DIGITS:
        found = Networks(load_unet(), load_guide(softplus_beta=3.0), *DIGITS[name], 0.4)
    else:
        # ADM's ImageNet-64 model, narrower and shallower; as nothing is trained, the pictures show nothing
        torch.manual_seed(0)
        unet = UNet(
            image_size=64,
            in_channels=3,
            model_channels=32,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=(4, 8),
            channel_mult=(1, 2, 2, 4),
            num_classes=1000,
            num_head_channels=32,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
        for parameter in unet.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        # on a GPU as many images as keep it busy, and so many steps that what comes before them is little
        count, steps = (4, 2) if device.type == "cpu" else (128, 20)
        found = Networks(unet, resnet18(softplus_beta=3.0), count, steps, 300.0)
    for network in found[:2]:
        network.eval().requires_grad_(False).to(device)
    return found


def sampler(of: Networks, guidance: Guidance, **options: Any) -> FDivSampler:
    return FDivSampler(of.model, of.classifier, guidance, class_conditional=True, **options)


def labels_of(of: Networks, device: torch.device) -> Tensor:
    return torch.arange(of.images, device=device) % 10


def ours(of: Networks, guidance: Guidance, device: torch.device, **options: Any) -> Callable[..., Tensor]:
    made = sampler(of, guidance, **options)
    labels, seeds = labels_of(of, device).cpu(), torch.arange(of.images)

    def run(noise: Tensor | None = None) -> Tensor:
        return made.sample(labels, seeds, of.steps, noise=noise, progress=False).images

    return run


def eager(of: Networks, divergence: str, device: torch.device) -> Callable[..., Tensor]:
    loop = EagerDiffusion(Schedule.linear().respaced(of.steps))
    gradient = gradient_of(of.classifier, peers.score(divergence), of.scale)
    labels = labels_of(of, device)

    def run(noise: Tensor | None = None) -> Tensor:
        draws = drawn((of.images, *shape_of(of)), device) if noise is None else iter(noise)
        return loop.sample(of.model, gradient, labels, draws)

    return run


def shape_of(of: Networks) -> tuple[int, int, int]:
    return of.model.in_channels, of.model.image_size, of.model.image_size


def tape(of: Networks, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((of.steps + 1, of.images, *shape_of(of)), generator=generator).to(device)


def title(name: str, of: Networks) -> str:
    size = "x".join(map(str, shape_of(of)))
    return f"sampling {name}: {of.images} of {size}, {of.steps} steps"


by_networks = pytest.mark.parametrize("name", ["digits", pytest.param("few digits", marks=pytest.mark.smoke), "adm64"])


@by_networks
@pytest.mark.parametrize("divergence", ["none", "js"])
def test_against_an_eager_loop(compare, device, backend, name: str, divergence: str) -> None:
    """EluCD's guidance, and with JS: the same networks and noise give the same images, then each draws its own."""
    of = networks(name, device)
    guidance = Guidance(divergence, scale=of.scale)
    mine, loop, noise = ours(of, guidance, device), eager(of, divergence, device), tape(of, device)
    images = mine(noise)
    torch.testing.assert_close(images, loop(noise), rtol=0, atol=2e-5)
    # guidance has moved them by more than what they may differ by
    without = sampler(of, Guidance("none", scale=0.0)).sample(
        labels_of(of, device).cpu(), steps=of.steps, noise=noise, progress=False
    )
    assert (without.images - images).abs().max() > 0.02
    group = f"{title(name, of)}, {'EluCD' if divergence == 'none' else 'JS'}"
    compare(group, "eager loop", loop, mine, (), waits=True, table="sampling", per_step=1 / of.steps)


OPTIONS: dict[str, dict[str, Any]] = {
    "no diagnostics": {"diagnostics": False},
    "channels_last": {"channels_last": True},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, channels_last": {"dtype": torch.bfloat16, "channels_last": True},
    "guided at 0.5 < σ ≤ 5 only": {"interval": (0.5, 5.0)},
}
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "CUDA graph": {"cuda_graph": True},
    "CUDA graph, bf16, channels_last": {"cuda_graph": True, "dtype": torch.bfloat16, "channels_last": True},
}


@by_networks
@pytest.mark.parametrize("option", [*OPTIONS, *GPU_OPTIONS])
def test_options(compare, device, backend, not_measured, name: str, option: str) -> None:
    """Ours with an option against ours without: what it gains, and how far it moves the images."""
    if option in GPU_OPTIONS and device.type != "cuda":
        not_measured("sampling by CUDA graphs needs a GPU")
    settings = dict((OPTIONS | GPU_OPTIONS)[option])
    interval = settings.pop("interval", None)
    of = networks(name, device)
    changed = ours(of, Guidance("js", scale=of.scale, interval=interval), device, **settings)
    # other images, of less work
    against_plain(compare, device, name, option, changed, changes_work=interval is not None)


def test_compiled(compare, device, backend) -> None:
    """Where Python and dispatch are most of the networks' time: compiling them takes a minute or two for each shape."""
    name = "few digits"
    of = networks(name, device)
    changed, noise = ours(of, Guidance("js", scale=of.scale), device, compile=True), tape(of, device)
    torch._dynamo.reset()
    # nothing that an earlier run has compiled
    with torch._inductor.config.patch(force_disable_caches=True):
        first, second = seconds_of(lambda: changed(noise)), seconds_of(lambda: changed(noise))
    against_plain(compare, device, name, "torch.compile", changed, changes_work=False, compile_s=first - second)


def seconds_of(call: Callable[[], Tensor]) -> float:
    """Of one call, until its result is there."""
    start = time.perf_counter()
    call().cpu()
    return time.perf_counter() - start


def against_plain(
    compare: Callable[..., None],
    device: torch.device,
    name: str,
    option: str,
    changed: Callable[..., Tensor],
    **more: Any,
) -> None:
    of = networks(name, device)
    plain, noise = ours(of, Guidance("js", scale=of.scale), device), tape(of, device)
    compare(
        f"{title(name, of)}, JS, {option}",
        "without",
        plain,
        changed,
        (),
        waits=True,
        table="options",
        difference=float((changed(noise) - plain(noise)).abs().max()),
        per_step=1 / of.steps,
        **more,
    )


@by_networks
def test_parts(benchmark, device, backend, seconds, name: str) -> None:
    """A guided step taken apart: the networks within whole runs on a CPU, on a GPU, and our ops, each by itself."""
    of = networks(name, device)
    shape = (of.images, *shape_of(of))
    labels = labels_of(of, device)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    row = Schedule.linear().respaced(of.steps).coefficients()[of.steps // 2].to(device)
    t = row[15].long().repeat(of.images)
    seeds = torch.arange(of.images, device=device)
    with torch.no_grad():
        output = of.model(x_t, t, y=labels)
    x0 = predict_x0(x_t, output, row).requires_grad_()
    logits = of.classifier(x0)
    found = guidance_gradient(logits.detach(), labels)
    (gradient,) = torch.autograd.grad(logits, x0, found.grad, retain_graph=True)

    def classify() -> Tensor:
        return of.classifier(x0)

    whole_run = ours(of, Guidance("js", scale=of.scale), device)
    calls: dict[str, Callable[[], Any]] = {
        "ours, whole": whole_run,
        "eager, whole": eager(of, "js", device),
        "predict_x0": lambda: predict_x0(x_t, output, row),
        "guidance_gradient": lambda: guidance_gradient(logits.detach(), labels),
        "guided_step": lambda: guided_step(x_t, output, row, gradient, scale=of.scale, seeds=seeds),
    }
    if device.type != "cpu":
        calls["model"] = torch.no_grad()(lambda: of.model(x_t, t, y=labels))
        calls["classifier"] = classify
        calls["its gradient (VJP)"] = lambda: torch.autograd.grad(logits, x0, found.grad, retain_graph=True)
    clock = clock_of(device)
    copies = [clock.copies(())] * len(calls)
    times = dict(zip(calls, interleaved(clock, list(calls.values()), copies, seconds)))
    whole, loop = (times.pop(side) / of.steps * 1e6 for side in ("ours, whole", "eager, whole"))
    parts = {part: each * 1e6 for part, each in times.items()}
    kernels = sum(parts[part] for part in ("predict_x0", "guidance_gradient", "guided_step"))
    if device.type == "cpu":
        within = {
            "model": (of.model, "forward"),
            "classifier": (of.classifier, "forward"),
            "its gradient (VJP)": (torch.autograd, "grad"),
        }
        parts = {part: share * whole for part, share in shares_within(whole_run, within, seconds).items()} | parts
    benchmark.group = f"{title(name, of)}, parts"
    benchmark.pedantic(whole_run, rounds=1)
    networks_us = sum(parts[part] for part in ("model", "classifier", "its gradient (VJP)"))
    benchmark.extra_info.update(
        table="parts",
        step_us=whole,
        eager_step_us=loop,
        parts_us=parts,
        share_of_ours=kernels / whole,
        share_around=1 - networks_us / whole,
    )
