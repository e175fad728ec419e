"""The demo's checkpoints: where they lie, and how they are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from calguide_fast.demo.networks import DigitClassifier, digit_unet
from calguide_fast.models import UNet, load_checkpoint

ASSETS = Path(__file__).parent / "assets"
CARD = "card.json"  # how the checkpoints were made, and what they reached

UNET = "unet"
GUIDE = "guide"
OVERCONFIDENT = "overconfident"
JUDGE = "judge"

JUDGE_WIDTH = 32
SOFTPLUS_BETA = 3.0  # EluCD's, for the ImageNet-128 run

Network = TypeVar("Network", bound=nn.Module)


def save_half(network: nn.Module, folder: Path, name: str) -> None:
    """Write the weights as `folder`/`name`.safetensors in half precision."""
    weights = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors")


def load_unet(folder: Path = ASSETS) -> UNet:
    """The diffusion model of digits, conditional on 0..9 and unconditional at `NULL_CLASS`."""
    return _load(digit_unet(), folder, UNET)


def load_guide(
    folder: Path = ASSETS, overconfident: bool = False, softplus_beta: float | None = None
) -> DigitClassifier:
    """The classifier that guides, trained on few labels, or its overconfident twin."""
    return _load(DigitClassifier(softplus_beta=softplus_beta), folder, OVERCONFIDENT if overconfident else GUIDE)


def load_judge(folder: Path = ASSETS) -> DigitClassifier:
    """The classifier that judges samples and guides none: its features and its opinion of the class."""
    return _load(DigitClassifier(JUDGE_WIDTH), folder, JUDGE)


def _load(network: Network, folder: Path, name: str) -> Network:
    return load_checkpoint(network, folder / f"{name}.safetensors").eval().requires_grad_(False)
