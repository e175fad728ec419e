"""The options of ``calguide-fast sample``."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calguide_fast.generation.presets import PRESETS, RECIPES
from calguide_fast.ops.divergences import CODES

DESCRIPTION = """\
Sample images from a diffusion model, guided by a classifier, in numbers that figures are published of.

Under torchrun the processes share the batches out among themselves, through a folder that all of them see; the bytes
are those of one process. SIGINT and SIGTERM (and a crash, and a full disk) lose no batch that is done: the same
command with --resume samples what is missing.

In parentheses: what holds unless an option is given.
"""

_ABOUT = "\n".join(
    textwrap.fill(recipe.about, 100, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    for name, recipe in RECIPES.items()
)
RECIPES_EPILOG = f"""\
recipes:
{_ABOUT}
  Any option of guidance changes the recipe's setting.
"""
EPILOG = f"""\
{RECIPES_EPILOG}
examples:
  calguide-fast sample --preset digits --out out/digits
  calguide-fast sample --preset digits --method heun --steps 18 --churn 10 --out out/heun
  calguide-fast sample --preset imagenet128 --unet 128x128_diffusion.pt --recipe elucd \\
      --classifier resnet101:resnet101-cd907fc2.pth --dtype bf16 --out out/elucd
  calguide-fast sample --preset imagenet128 --unet 128x128_diffusion.pt --recipe adm-g \\
      --classifier imagenet128:128x128_classifier.pt --labels random --out out/adm-g
  torchrun --nproc-per-node 8 -m calguide_fast sample ... --resume --out out/elucd
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command to its parser. What is not given is None, for the preset and the recipe to decide."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    for add in (add_networks, add_images, add_process, add_guidance, add_machine, _add_output):
        add(parser)


def options_of(preset: str, out: Path, given: Mapping[str, Any]) -> argparse.Namespace:
    """What the command's parser makes of a preset, a folder, and the options that are given by their names."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(["--preset", preset, "--out", str(out)])
    vars(options).update({name: value for name, value in given.items() if name in vars(options)})
    return options


def add_networks(parser: argparse.ArgumentParser) -> None:
    networks = parser.add_argument_group("networks")
    networks.add_argument(
        "--preset",
        required=True,
        choices=PRESETS,
        help="one of OpenAI's ADM models of ImageNet, or the demo's digits, whose weights are in the package: "
        f"{', '.join(PRESETS)}",
        metavar="NAME",
    )
    networks.add_argument("--unet", type=Path, metavar="PATH", help="the model's weights, .pt or .safetensors")
    networks.add_argument(
        "--classifier",
        action="append",
        metavar="NAME:PATH",
        help="resnet18 ... resnet152 with torchvision's weights, of clean images, which sees the predicted x0; or a "
        "preset's noise-aware ADM classifier, which sees x_t. For digits: guide or overconfident (guide). Given "
        "several times, the mean of their scores guides",
    )
    networks.add_argument(
        "--classifier-weights",
        type=float,
        nargs="+",
        metavar="W",
        help="of several classifiers in that mean, in their order (equal)",
    )
    networks.add_argument(
        "--softplus-beta",
        type=float,
        metavar="BETA",
        help="swap ResNets' ReLU for Softplus, 0 keeps ReLU (elucd, ours: 3; elucd-edm: 5; adm-g: ReLU)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument("--num-samples", type=int, metavar="N", help="how many (50000; digits: 2000)")
    images.add_argument(
        "--labels",
        default="balanced",
        metavar="WHICH",
        help="balanced: image i is of class i mod C; random: drawn from its seed, uniformly, as guided-diffusion's "
        "sampler does from its own; or classes in turn, like 207,88 or 0-9 (%(default)s)",
    )
    images.add_argument("--seeds", metavar="A-B", help="one for each image, like 0-49999 or 1,2,8-15 (0 to N-1)")
    images.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="images at a time, on each device. A tilt weighs these against each other; a crash costs no more than "
        "these (64; digits: 200)",
    )


def add_process(parser: argparse.ArgumentParser) -> None:
    process = parser.add_argument_group("reverse process")
    process.add_argument(
        "--steps",
        help="guided-diffusion's timestep_respacing: 250, ddim25 or 10,15,20; for heun and dpmpp EDM's num_steps, how "
        "many noise levels are visited, which is 18 there by default (250, as ADM and EluCD publish; digits: 25)",
    )
    process.add_argument(
        "--method",
        default="ddpm",
        help="ddpm; ddim; heun: EDM's, two evaluations a step; dpmpp: DPM-Solver++(2M) (%(default)s)",
    )
    process.add_argument(
        "--eta", type=float, default=0.0, help="DDIM's: 0 draws no noise, 1 as much as DDPM (%(default)s)"
    )
    process.add_argument(
        "--sigma-min",
        type=float,
        metavar="S",
        help="heun's and dpmpp's last noise level (EDM's 0.002, or the schedule's lowest)",
    )
    process.add_argument("--sigma-max", type=float, metavar="S", help="the first (EDM's 80, or the schedule's highest)")
    process.add_argument(
        "--churn", type=float, default=0.0, metavar="S", help="heun's fresh noise, EDM's S_churn (0: none)"
    )
    process.add_argument(
        "--s-tmin", type=float, default=0.0, metavar="S", help="churn where S <= sigma, EDM's S_min (0)"
    )
    process.add_argument(
        "--s-tmax", type=float, default=math.inf, metavar="S", help="and where sigma <= S, EDM's S_max (inf)"
    )
    process.add_argument(
        "--s-noise", type=float, default=1.0, metavar="S", help="deviation of churn's noise, EDM's S_noise (1)"
    )
    process.add_argument(
        "--recurrence",
        type=int,
        default=1,
        metavar="K",
        help="take each guided step K times, going back to its noise level in between, arXiv 2302.07121; not for "
        "dpmpp (%(default)s)",
    )
    process.add_argument(
        "--cfg-scale",
        type=float,
        default=1.0,
        metavar="W",
        help="classifier-free guidance, with a classifier's or alone: eps_null + W (eps_label - eps_null), at twice "
        "the model's work (1: off)",
    )
    process.add_argument(
        "--null-class",
        type=int,
        metavar="N",
        help="for --cfg-scale, the label that makes the model unconditional (digits: 10; OpenAI's models have none)",
    )


def add_guidance(parser: argparse.ArgumentParser) -> None:
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument(
        "--recipe",
        choices=RECIPES,
        default="ours",
        help="settings of guidance that the options below change one by one; listed at the end (%(default)s)",
    )
    guidance.add_argument(
        "--divergence",
        metavar="NAME",
        help=f"{', '.join(name for name in CODES if name != 'alpha')} or alpha:a (ours: js; others: none)",
    )
    guidance.add_argument("--alpha", type=float, help="weight of the divergence (ours: 1)")
    guidance.add_argument("--epsilon", type=float, help="weight of the label in the divergence's target (ours: 0.9)")
    guidance.add_argument(
        "--joint-temperature", type=float, metavar="T1", help="multiplies the label's logit (all recipes: 1)"
    )
    guidance.add_argument(
        "--marginal-temperature",
        type=float,
        metavar="T2",
        help="multiplies the logits in the log-sum-exp; absolute, where EluCD's command line gives it relative to the "
        "joint one (adm-g: 1; elucd, ours: 0.5; elucd-edm: 0)",
    )
    guidance.add_argument(
        "--scale",
        type=float,
        help="guided-diffusion's classifier_scale, of the image gradient (elucd: 1, published for imagenet128; adm-g: "
        "imagenet64 1, imagenet128 0.5 (25 DDIM steps: 1), imagenet256 1, imagenet256_uncond 10, imagenet512 4; "
        "digits: 0.2, adm-g 16)",
    )
    guidance.add_argument(
        "--sine-boost",
        type=float,
        metavar="GAMMA",
        help="EluCD's boost of the guided step's variance, DDPM only (elucd, ours: 0.3 with ddpm; else 0)",
    )
    guidance.add_argument(
        "--rule",
        choices=("score", "edm"),
        help="score: the gradient is a part of the score that is followed; edm: EluCD's for Heun and classifiers of "
        "clean images, a step in the gradient's direction, whatever its size (elucd-edm: edm; others: score)",
    )
    guidance.add_argument(
        "--max-guidance",
        type=float,
        metavar="M",
        help="the edm rule's strength, in place of --scale (0.001; elucd-edm: 0.004)",
    )
    guidance.add_argument(
        "--add-factor", type=float, metavar="A", help="the edm rule adds A M sin(pi i/steps) (0; elucd-edm: 0.3)"
    )
    guidance.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide only where LO < sigma <= HI, in EDM's units; HI may be inf (everywhere)",
    )
    guidance.add_argument(
        "--tilt",
        type=float,
        metavar="T",
        help="weigh the guidance of a batch's images by the softmax of T times their log-probabilities; below 0 "
        "favours those that the classifier doubts, and the paper's is -0.2 (0: off)",
    )
    guidance.add_argument(
        "--tilt-on", choices=("log_prob", "score"), help="take the whole score in place of log-probabilities (log_prob)"
    )
    guidance.add_argument(
        "--tilt-max", type=float, metavar="W", help="clip the tilt's weights, whose mean is 1 (no clip)"
    )
    guidance.add_argument(
        "--entropy-weight", type=float, metavar="LAMBDA", help="add the entropy of the prediction to the score (0)"
    )
    guidance.add_argument(
        "--adaptive-entropy",
        action=argparse.BooleanOptionalAction,
        help="weigh the entropy most where the classifier is surest (no)",
    )
    guidance.add_argument(
        "--entropy-scaling",
        type=float,
        metavar="MAX",
        help="multiply the gradient by ED-DPM's factor log C / H(p), at most MAX (off)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (each process's own GPU, else the CPU)")
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the networks (fp32)")
    machine.add_argument("--channels-last", action="store_true", help="run the networks in that memory format")
    machine.add_argument("--compile", action="store_true", help="run the networks through torch.compile")
    machine.add_argument("--cuda-graph", action="store_true", help="replay each step as one CUDA graph")


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or, with --resume, one that was begun"
    )
    output.add_argument(
        "--resume", action="store_true", help="sample what is missing there; begins, too, where there is nothing"
    )
    output.add_argument(
        "--grid", type=int, default=100, metavar="N", help="images in grid.png, 0 for none (%(default)s)"
    )
    output.add_argument("--png", action="store_true", help="write png/CLASS/INDEX.png, too")
