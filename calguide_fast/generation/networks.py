"""The networks of a preset, with their weights, and the files these come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from calguide_fast import models
from calguide_fast.demo import checkpoints as digits
from calguide_fast.generation.presets import DIGITS
from calguide_fast.models.specs import load_classifier, load_unet

GUIDES = (digits.GUIDE, digits.OVERCONFIDENT)


class Networks(NamedTuple):
    """On the CPU, in eval mode."""

    unet: nn.Module
    classifier: nn.Module | None
    classifier_input: str  # "x0" or "xt"


class Sources(NamedTuple):
    """Which networks are wanted."""

    preset: str
    unet: Path
    classifier: str | None  # as `load_classifier` takes it, or one of GUIDES; None without guidance
    softplus_beta: float | None

    @property
    def files(self) -> Mapping[str, Path]:
        """The checkpoints by what they are."""
        if self.classifier is None:
            return {"unet": self.unet}
        if self.preset == DIGITS:
            return {"unet": self.unet, "classifier": digits.ASSETS / f"{self.classifier}.safetensors"}
        return {"unet": self.unet, "classifier": Path(self.classifier.partition(":")[2]).expanduser()}

    @property
    def architecture(self) -> str | None:
        """The classifier's name without its path."""
        return None if self.classifier is None else self.classifier.partition(":")[0]

    @classmethod
    def of(
        cls, preset: str, unet: Path | None, classifier: str | None, guided: bool, softplus_beta: float | None
    ) -> Sources:
        """What a command line asks for.

        Args:
            preset: names the UNet.
            unet: its file; the digits' is a part of the package.
            classifier: what guides; the digits' default is a part of the package.
            guided: whether there is guidance.
            softplus_beta: of a classifier that has ReLUs to replace, None for ReLU.

        Raises:
            ValueError: something is missing, or of no use.
        """
        if not guided and classifier is not None:
            raise ValueError(f"classifier={classifier!r} has no use without guidance")
        if preset == DIGITS:
            if unet is not None:
                raise ValueError(f"the preset {DIGITS} brings its own UNet, and takes no unet={unet}")
            if classifier is not None and classifier not in GUIDES:
                raise ValueError(
                    f"classifier={classifier!r}: the preset {DIGITS} brings its own, {' or '.join(GUIDES)}"
                )
            unet = digits.ASSETS / f"{digits.UNET}.safetensors"
            return cls(preset, unet, (classifier or digits.GUIDE) if guided else None, softplus_beta)
        if unet is None:
            raise ValueError(f"the preset {preset} needs its weights: --unet PATH")
        if guided and classifier is None:
            raise ValueError(
                "guidance needs a classifier: --classifier resnet101:PATH, or, noise-aware, "
                f"{preset.removesuffix('_uncond')}:PATH; --recipe unguided samples without"
            )
        return cls(preset, unet.expanduser(), classifier, softplus_beta)

    def load(self) -> Networks:
        """Build the networks with their weights.

        Raises:
            FileNotFoundError, ValueError: as `load_unet` and `load_classifier`, or the classifier is of another
                resolution or noise schedule than the UNet.
        """
        if self.preset == DIGITS:
            guide = None
            if self.classifier is not None:
                overconfident = self.classifier == digits.OVERCONFIDENT
                guide = digits.load_guide(overconfident=overconfident, softplus_beta=self.softplus_beta)
            return Networks(digits.load_unet(), guide, "x0")
        unet = load_unet(self.preset, self.unet)
        if self.classifier is None:
            return Networks(unet, None, "x0")
        found = load_classifier(self.classifier, self.softplus_beta)
        if found.preset is not None:
            theirs, ours = models.PRESETS[found.preset], models.PRESETS[self.preset]
            if (theirs.image_size, theirs.schedule) != (ours.image_size, ours.schedule):
                raise ValueError(f"the classifier of {found.preset} knows no noisy images of {self.preset}")
        return Networks(unet, found.module, found.classifier_input)
