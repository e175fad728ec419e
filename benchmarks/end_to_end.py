"""Guided sampling at full size: images per second of EluCD's eager loop and of ours, on the same networks and GPU.

    python benchmarks/end_to_end.py --out FILE [--seconds 270] [--batches 64,1,256,16]

ADM's ImageNet UNet and a ResNet-101 with random weights. Few steps are timed, and what one more step takes gives the
time of 250: every row says so. Each row is in FILE, and in the page beside it, as soon as it is measured; rows for
which no time is left are listed with that reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import peers
import torch
from loops import EagerDiffusion, drawn, gradient_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from calguide_fast import FDivSampler, Guidance
from calguide_fast.models import adm_unet, resnet101
from calguide_fast.schedule import Schedule

STEPS, IMAGES = 250, 50_000
# steps that are timed: these, and as many more as take about so many seconds, within these bounds
FEWEST, ABOUT, MOST = 4, 1.5, 50
# of the time of a row that compiles nothing, as a guess at the next one's
COMPILING = 90.0
DIVERGENCE = "none"  # EluCD's guidance
OUR_KERNELS = re.compile(r"guide_(warp|block)_rows|(step|x0|normal|tilt|predict|guidance)_kernel")
EAGER, EQUAL = "EluCD's loop", "ours"


@dataclass(frozen=True)
class Way:
    """How to sample: the loop's own, or ours with options."""

    name: str
    options: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def compiles(self) -> bool:
        return bool(self.options and self.options.get("compile"))


FAST = {"dtype": torch.bfloat16, "channels_last": True, "cuda_graph": True}
WAYS = [
    Way(EAGER),
    Way(EQUAL, {}),
    Way("ours, CUDA graph", {"cuda_graph": True}),
    Way("ours, bf16, channels_last, CUDA graph", FAST),
    Way("ours, bf16, channels_last, compiled, CUDA graph", {**FAST, "compile": True}),
]


@dataclass(frozen=True)
class Networks:
    """A UNet whose torso is half precision, as EluCD runs it, and a classifier in fp32."""

    unet: nn.Module
    classifier: nn.Module

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.unet.in_channels, self.unet.image_size, self.unet.image_size


def networks(preset: str, device: torch.device) -> Networks:
    """At full size; nothing is trained, so the pictures show nothing."""
    torch.manual_seed(0)
    with device:
        unet, classifier = adm_unet(preset), resnet101(softplus_beta=3.0)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        for name, module in classifier.named_modules():
            # residual branches that add little, so that nothing grows beyond measure on its way through all of them
            if name.endswith("bn3"):
                module.weight.fill_(0.2)
    for network in (unet, classifier):
        network.eval().requires_grad_(False)
    if device.type == "cuda":
        unet.convert_to_fp16()
    return Networks(unet, classifier)


Run = Callable[[int, Iterator[Tensor] | None], Tensor]


def runner(of: Networks, way: Way, batch: int, device: torch.device, scale: float = 1.0) -> Run:
    """``run(steps, noise)`` samples a batch; noise None draws it."""
    labels = torch.arange(batch) % 1000
    if way.options is None:
        gradient = gradient_of(of.classifier, peers.score(DIVERGENCE), scale)
        on_device = labels.to(device)

        def eager(steps: int, noise: Iterator[Tensor] | None) -> Tensor:
            loop = EagerDiffusion(Schedule.linear().respaced(steps))
            draws = drawn((batch, *of.shape), device) if noise is None else noise
            return loop.sample(of.unet, gradient, on_device, draws)

        return eager
    sampler = FDivSampler(
        of.unet, of.classifier, Guidance(DIVERGENCE, scale=scale), class_conditional=True, **way.options
    )
    seeds = torch.arange(batch)

    def ours(steps: int, noise: Iterator[Tensor] | None) -> Tensor:
        tape = None if noise is None else (lambda: next(noise))
        return sampler.sample(labels, seeds, steps, noise=tape, progress=False).images

    return ours


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Run, steps: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run(steps, None)
    wait(device)
    return time.perf_counter() - start


def measured(run: Run, batch: int, device: torch.device) -> dict[str, Any]:
    """What one step takes, what is around the steps, and what that makes of 250."""
    # twice: graphs are recorded at a step's fourth run
    first = seconds_of(run, FEWEST + 2, device)
    warm = seconds_of(run, FEWEST, device)
    more = min(MOST, max(FEWEST, round(ABOUT / (warm / FEWEST))))
    short = statistics.median(seconds_of(run, FEWEST, device) for _ in range(3))
    long = seconds_of(run, FEWEST + more, device)
    step = (long - short) / more
    around = max(0.0, short - FEWEST * step)
    rate = batch / (around + STEPS * step)
    return {
        "first_s": first,
        "step_ms": step * 1e3,
        "around_ms": around * 1e3,
        "steps_timed": more,
        "images_per_s": rate,
        "extrapolated": f"{STEPS} steps from {more}",
        "gpu_hours_50k": IMAGES / rate / 3600,
    }


def launches(run: Run, device: torch.device) -> dict[str, Any]:
    """Of one step: kernels on the device, those of them that are ours, their times, and what the host asked for."""
    if device.type != "cuda":
        return {}
    found = []
    for steps in (2, 4):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
            run(steps, None)
            torch.cuda.synchronize()
        events = watched.profiler.kineto_results.events()
        kernels = [
            e for e in events if e.device_type() == DeviceType.CUDA and not e.name().startswith(("Memcpy", "Memset"))
        ]
        own = [e for e in kernels if OUR_KERNELS.search(e.name())]
        asked = [e for e in events if re.match(r"cu(da)?(Launch|GraphLaunch)", e.name())]
        found.append(
            [
                len(kernels),
                len(own),
                len(asked),
                sum(e.duration_ns() for e in kernels),
                sum(e.duration_ns() for e in own),
            ]
        )
    kernels, own, asked, busy, own_busy = ((more - few) / 2 for few, more in zip(*found))
    return {
        "kernels_per_step": kernels,
        "own_kernels_per_step": own,
        "host_launches_per_step": asked,
        "busy_ms_per_step": busy / 1e6,
        "own_ms_per_step": own_busy / 1e6,
    }


def parts(of: Networks, batch: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the networks' shares of a step by themselves: UNet, classifier, its gradient."""
    x = torch.randn((batch, *of.shape), device=device)
    t, y = torch.full((batch,), 500, device=device), torch.arange(batch, device=device) % 1000
    x0 = x.clamp(-1, 1).requires_grad_()

    def gradient() -> None:
        torch.autograd.grad(of.classifier(x0).sum(), x0)

    calls = {"unet": torch.no_grad()(lambda: of.unet(x, t, y)), "classifier and its gradient": gradient}
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(4):
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times[1:]) * 1e3
    return found


def difference(of: Networks, batch: int, device: torch.device, steps: int = 6) -> dict[str, float]:
    """How far our images are from the loop's, with the same noise, and how far guidance has moved them."""
    source = torch.Generator(device).manual_seed(1)
    tape = [torch.randn((batch, *of.shape), device=device, generator=source) for _ in range(steps + 1)]
    scale = 20.0
    loop, ours = (runner(of, way, batch, device, scale)(steps, iter(tape)) for way in WAYS[:2])
    unguided = runner(of, WAYS[1], batch, device, 0.0)(steps, iter(tape))
    return {
        "mean": float((loop - ours).abs().mean()),
        "most": float((loop - ours).abs().max()),
        "guided_by": float((unguided - ours).abs().max()),
    }


def page(results: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    equal = results["equal_output"]
    lines = [
        f"# Whole sampling on {results['device']}",
        "",
        f"{results['preset']}, {results['classifier']}, torch {results['torch']}; random weights. Seconds of {STEPS} "
        "steps are those of one more step, times their number. With the same noise, ours and the loop's images differ "
        f"by {equal['mean']:.2g} on average and {equal['most']:.2g} at most; guidance moves them by "
        f"{equal['guided_by']:.2g}.",
        "",
        "| batch | | ms a step | images/s | times the loop | kernels a step | of them ours | launches by the host | "
        "GPU busy | GPU h for 50k |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "reason" in row:
            lines.append(f"| {row['batch']} | {row['way']} | {row['reason']} | | | | | | | |")
            continue
        cells = [row["batch"], row["way"], f"{row['step_ms']:.2f}", f"{row['images_per_s']:.4g}"]
        cells.append(f"{row['times_eager']:.2f}" if "times_eager" in row else "")
        for name in ("kernels_per_step", "own_kernels_per_step", "host_launches_per_step"):
            cells.append(f"{row[name]:.0f}" if name in row else "")
        cells.append(f"{row['busy_ms_per_step'] / row['step_ms']:.0%}" if "busy_ms_per_step" in row else "")
        lines.append(f"| {' | '.join(map(str, [*cells, format(row['gpu_hours_50k'], '.1f')]))} |")
    parts = [
        f"- batch {batch}: " + ", ".join(f"{part} {time:.2f} ms" for part, time in found.items())
        for batch, found in results["parts_ms"].items()
    ]
    return "\n".join([*lines, "", "The networks of the loop by themselves:", "", *parts]) + "\n"


def write(path: Path, results: dict[str, Any]) -> None:
    """The results and their page, each all of it or nothing, whatever happens meanwhile."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    for target, content in ((path, text), (path.with_suffix(".md"), page(results))):
        unfinished = target.with_name(target.name + ".unfinished")
        unfinished.write_text(content)
        os.replace(unfinished, target)


def order(batches: list[int]) -> list[tuple[int, Way]]:
    """All that compiles nothing first, batch by batch; then what takes a minute to compile."""
    quick = [way for way in WAYS if not way.compiles]
    return [*product(batches, quick), *product(batches, [way for way in WAYS if way.compiles])]


def line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['batch']:>4}  {row['way']:<50} {row['reason']}"
    speed = f"{row['images_per_s']:>9.4f} images/s  {row['step_ms']:>8.2f} ms a step"
    times = f"  {row['times_eager']:.2f} x" if row.get("times_eager") else ""
    return f"{row['batch']:>4}  {row['way']:<50} {speed}{times}  {row['gpu_hours_50k']:.1f} GPU h for 50k"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--batches", default="64,1,256,16", help="in this order (default: %(default)s)")
    parser.add_argument("--preset", default="imagenet128", help="of ADM's UNets (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=270, help="begin no row later than this (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", help="cpu to try the script (default: %(default)s)")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    batches = [int(batch) for batch in options.batches.split(",")]
    start = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    of = networks(options.preset, device)
    results: dict[str, Any] = {
        "preset": options.preset,
        "classifier": "resnet101",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "equal_output": difference(of, min(batches[0], 4), device),
        "parts_ms": {},
        "rows": [],
    }
    print(f"end-to-end: images differ by {results['equal_output']}, {time.monotonic() - start:.0f} s", flush=True)
    eager: dict[int, float] = {}
    for batch, way in order(batches):
        row: dict[str, Any] = {"batch": batch, "way": way.name}
        left = options.seconds - (time.monotonic() - start)
        if left < (COMPILING if way.compiles else 0):
            row["reason"] = "not measured: no time was left"
        else:
            try:
                if way.compiles:
                    # for this batch size alone, as the first one is compiled
                    torch._dynamo.reset()
                run = runner(of, way, batch, device)
                row |= measured(run, batch, device) | launches(run, device)
                if way.name == EAGER:
                    eager[batch] = row["images_per_s"]
                    results["parts_ms"][str(batch)] = parts(of, batch, device)
                elif batch in eager:
                    row["times_eager"] = row["images_per_s"] / eager[batch]
            except torch.OutOfMemoryError as error:
                row["reason"] = f"not measured: {str(error).partition('.')[0]}"
            finally:
                run = None  # type: ignore[assignment]
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        results["rows"].append(row)
        write(options.out, results)
        print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
