"""The published ADM models of ImageNet (Dhariwal & Nichol, 2021, arXiv 2105.05233), as data and as constructors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .unet import EncoderUNet, UNet

ATTENTION_PIXELS = (32, 16, 8)


@dataclass(frozen=True)
class Preset:
    """One published pair of UNet and classifier, with the facts of diffusion it was trained under.

    Attributes:
        image_size: height and width in pixels.
        schedule: name of the β schedule, "linear" or "cosine".
        diffusion_steps: T, the length of that schedule.
        learned_variance: whether the UNet also puts out v, the learned-range variance.
        classifier_scale: guidance scale published for the pair at 250 steps.
        unet: keywords of `UNet`.
        classifier: keywords of `EncoderUNet`.
    """

    image_size: int
    schedule: str
    diffusion_steps: int
    learned_variance: bool
    classifier_scale: float
    unet: Mapping[str, Any]
    classifier: Mapping[str, Any]


def _preset(
    image_size: int,
    channel_mult: tuple[float, ...],
    classifier_scale: float,
    schedule: str = "linear",
    num_classes: int | None = 1000,
    classifier_depth: int = 2,
    **unet: Any,
) -> Preset:
    shared = {
        "image_size": image_size,
        "in_channels": 3,
        "attention_resolutions": tuple(image_size // pixels for pixels in ATTENTION_PIXELS),
        "channel_mult": channel_mult,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    classifier = {
        "model_channels": 128,
        "out_channels": 1000,
        "num_res_blocks": classifier_depth,
        "num_head_channels": 64,
        "pool": "attention",
    }
    return Preset(
        image_size=image_size,
        schedule=schedule,
        diffusion_steps=1000,
        learned_variance=True,
        classifier_scale=classifier_scale,
        unet=MappingProxyType({**shared, "out_channels": 6, "num_classes": num_classes, **unet}),
        classifier=MappingProxyType({**shared, **classifier}),
    )


_WIDE: dict[str, Any] = {"model_channels": 256, "num_res_blocks": 2}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "imagenet64": _preset(
            64,
            (1, 2, 3, 4),
            1.0,
            schedule="cosine",
            classifier_depth=4,
            model_channels=192,
            num_res_blocks=3,
            num_head_channels=64,
            use_new_attention_order=True,
            dropout=0.1,
        ),
        "imagenet128": _preset(128, (1, 1, 2, 3, 4), 0.5, num_heads=4, **_WIDE),
        "imagenet256": _preset(256, (1, 1, 2, 2, 4, 4), 1.0, num_head_channels=64, **_WIDE),
        "imagenet256_uncond": _preset(256, (1, 1, 2, 2, 4, 4), 10.0, num_classes=None, num_head_channels=64, **_WIDE),
        "imagenet512": _preset(512, (0.5, 1, 1, 2, 2, 4, 4), 4.0, num_head_channels=64, **_WIDE),
    }
)


def _lookup(preset: str) -> Preset:
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def adm_unet(preset: str, **overrides: Any) -> UNet:
    """The UNet of a published model, untrained: load its weights with `load_checkpoint`.

    Args:
        preset: a name in `PRESETS`.
        **overrides: keywords of `UNet` that replace the preset's, such as `use_fp16=True` (the preset is fp32).

    Raises:
        ValueError: for an unknown preset, and as `UNet` does.
    """
    return UNet(**{**_lookup(preset).unet, **overrides})


def adm_classifier(preset: str, **overrides: Any) -> EncoderUNet:
    """The classifier of noisy images of a published model, untrained: load its weights with `load_checkpoint`.

    Args:
        preset: a name in `PRESETS`.
        **overrides: keywords of `EncoderUNet` that replace the preset's.

    Raises:
        ValueError: for an unknown preset, and as `EncoderUNet` does.
    """
    return EncoderUNet(**{**_lookup(preset).classifier, **overrides})
