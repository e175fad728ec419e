"""The published files that the table needs, and where they are published. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from calguide_fast.evaluation.inception import PUBLISHED_AT as INCEPTION

_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
_TORCHVISION = "https://download.pytorch.org/models"

# by what they are; those of ResNets are the ones that EluCD names
URLS: Mapping[str, str] = MappingProxyType(
    {
        "unet": f"{_OPENAI}/128x128_diffusion.pt",
        "imagenet128": f"{_OPENAI}/128x128_classifier.pt",
        "resnet50": f"{_TORCHVISION}/resnet50-11ad3fa6.pth",
        "resnet101": f"{_TORCHVISION}/resnet101-cd907fc2.pth",
        "inception": INCEPTION,
    }
)
REFERENCE = f"{_OPENAI}/ref_batches/imagenet/128/VIRTUAL_imagenet128_labeled.npz"


def files_in(folder: Path) -> dict[str, Path]:
    """Where each file is, or should be."""
    return {name: folder / url.rpartition("/")[2] for name, url in URLS.items()}


def missing_files(files: Mapping[str, Path], wanted: Iterable[str], reference: Path) -> list[str]:
    """A line for each file that is not there, which says where it is published."""
    asked = [(files[name], URLS[name]) for name in wanted] + [(reference, REFERENCE)]
    return [f"{path}: published at {url}" for path, url in asked if not path.is_file()]
