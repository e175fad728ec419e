"""The options of ``calguide-fast sample``."""

from __future__ import annotations

import argparse
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
"""

_RECIPES = "\n".join(
    textwrap.fill(recipe.about, 100, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    for name, recipe in RECIPES.items()
)
EPILOG = f"""\
recipes:
{_RECIPES}
  Any option of guidance changes the recipe's setting.

examples:
  calguide-fast sample --preset digits --out out/digits
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
        metavar="NAME:PATH",
        help="resnet18 ... resnet152 with torchvision's weights, of clean images, which sees the predicted x0; or a "
        "preset's noise-aware ADM classifier, which sees x_t. For digits: guide or overconfident",
    )
    networks.add_argument(
        "--softplus-beta",
        type=float,
        metavar="BETA",
        help="swap a ResNet's ReLU for Softplus, 0 keeps ReLU (elucd, ours: 3; EluCD's EDM runs: 5)",
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
        help="images at a time, on each device; what is tilted, and redone after a crash, together (64; digits: 200)",
    )


def add_process(parser: argparse.ArgumentParser) -> None:
    process = parser.add_argument_group("reverse process")
    process.add_argument(
        "--steps",
        help="OpenAI's respacing: 250, ddim25 or 10,15,20; for heun and dpmpp a number of Karras sigmas "
        "(250, as ADM and EluCD publish; digits: 25)",
    )
    process.add_argument("--method", default="ddpm", help="ddpm, ddim, heun or dpmpp (%(default)s)")
    process.add_argument("--eta", type=float, default=0.0, help="of DDIM (%(default)s)")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--recipe", choices=RECIPES, default="ours", help="where to begin; see below (%(default)s)")
    guidance.add_argument(
        "--divergence",
        metavar="NAME",
        help=f"{', '.join(name for name in CODES if name != 'alpha')} or alpha:a (elucd, adm-g: none; ours: js)",
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
        "joint one (adm-g: 1; elucd, ours: 0.5)",
    )
    guidance.add_argument(
        "--scale",
        type=float,
        help="of the image gradient (elucd: 1, published for imagenet128; adm-g: imagenet64 1, imagenet128 0.5 (25 "
        "DDIM steps: 1), imagenet256 1, imagenet256_uncond 10, imagenet512 4; digits: 0.2, adm-g 16)",
    )
    guidance.add_argument(
        "--sine-boost",
        type=float,
        metavar="GAMMA",
        help="EluCD's boost of the guided step's variance, DDPM only (elucd, ours: 0.3; adm-g: 0)",
    )
    guidance.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide only where LO < sigma <= HI, in EDM's units; inf is a HI (everywhere)",
    )
    guidance.add_argument("--tilt", type=float, metavar="T", help="of tilted sampling; the paper's is -0.2 (0: off)")
    guidance.add_argument("--tilt-on", choices=("log_prob", "score"), help="what is tilted (log_prob)")
    guidance.add_argument("--tilt-max", type=float, metavar="W", help="clip the tilt's weights (no clip)")
    guidance.add_argument("--entropy-weight", type=float, metavar="LAMBDA", help="weight of the entropy (0)")
    guidance.add_argument(
        "--adaptive-entropy",
        action=argparse.BooleanOptionalAction,
        help="weigh the entropy most where the classifier is surest (no)",
    )
    guidance.add_argument(
        "--entropy-scaling", type=float, metavar="MAX", help="ED-DPM's factor log C / H(p), at most this (off)"
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
