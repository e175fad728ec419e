"""The networks of a preset, with their weights, and the files these come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from calguide_fast import models
from calguide_fast.demo import checkpoints as digits
from calguide_fast.generation.presets import DIGITS
from calguide_fast.models.specs import existing_file, load_classifier, load_unet

GUIDES = (digits.GUIDE, digits.OVERCONFIDENT)


class Networks(NamedTuple):
    """On the CPU, in eval mode."""

    unet: nn.Module
    classifiers: tuple[nn.Module, ...]  # none without guidance
    classifier_input: str  # "x0" or "xt"


class Sources(NamedTuple):
    """Which networks are wanted."""

    preset: str
    unet: Path
    classifiers: tuple[str, ...]  # as `load_classifier` takes them, or of GUIDES; none without guidance
    softplus_beta: float | None

    @property
    def files(self) -> Mapping[str, Path]:
        """The checkpoints by what they are; of several classifiers the second is ``classifier_2``.

        Raises FileNotFoundError where one is not there.
        """
        found = {"unet": existing_file(self.unet)}
        for number, classifier in enumerate(self.classifiers, 1):
            name = "classifier" if number == 1 else f"classifier_{number}"
            if self.preset == DIGITS:
                found[name] = digits.ASSETS / f"{classifier}.safetensors"
            else:
                found[name] = existing_file(classifier.partition(":")[2])
        return found

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classifiers' names without their paths."""
        return tuple(classifier.partition(":")[0] for classifier in self.classifiers)

    @classmethod
    def of(
        cls, preset: str, unet: Path | None, classifiers: Sequence[str], guided: bool, softplus_beta: float | None
    ) -> Sources:
        """What a command line asks for.

        Args:
            preset: names the UNet.
            unet: its file; the digits' is a part of the package.
            classifiers: what guides; the digits' default is a part of the package.
            guided: whether there is guidance.
            softplus_beta: of classifiers that have ReLUs to replace, None for ReLU.

        Raises:
            ValueError: something is missing, or of no use.
        """
        if not guided and classifiers:
            raise ValueError(f"classifier={classifiers[0]!r} has no use without guidance")
        if preset == DIGITS:
            if unet is not None:
                raise ValueError(f"the preset {DIGITS} brings its own UNet, and takes no unet={unet}")
            for classifier in classifiers:
                if classifier not in GUIDES:
                    raise ValueError(
                        f"classifier={classifier!r}: the preset {DIGITS} brings its own, {' or '.join(GUIDES)}"
                    )
            unet = digits.ASSETS / f"{digits.UNET}.safetensors"
            return cls(preset, unet, tuple(classifiers or (digits.GUIDE,)) if guided else (), softplus_beta)
        if unet is None:
            raise ValueError(f"the preset {preset} needs its weights: --unet PATH")
        if guided and not classifiers:
            raise ValueError(
                "guidance needs a classifier: --classifier resnet101:PATH, or, noise-aware, "
                f"{preset.removesuffix('_uncond')}:PATH; --recipe unguided samples without"
            )
        return cls(preset, unet.expanduser(), tuple(classifiers), softplus_beta)

    def load(self) -> Networks:
        """Build the networks with their weights.

        Raises:
            FileNotFoundError, ValueError: as `load_unet` and `load_classifier`, or a classifier is of another
                resolution or noise schedule than the UNet, or some see x0 and others x_t.
        """
        if self.preset == DIGITS:
            guides = (
                digits.load_guide(overconfident=name == digits.OVERCONFIDENT, softplus_beta=self.softplus_beta)
                for name in self.classifiers
            )
            return Networks(digits.load_unet(), tuple(guides), "x0")
        unet = load_unet(self.preset, self.unet)
        found = [load_classifier(classifier, self.softplus_beta) for classifier in self.classifiers]
        for classifier in found:
            if classifier.preset is not None:
                theirs, ours = models.PRESETS[classifier.preset], models.PRESETS[self.preset]
                if (theirs.image_size, theirs.schedule) != (ours.image_size, ours.schedule):
                    raise ValueError(f"the classifier of {classifier.preset} knows no noisy images of {self.preset}")
        inputs = {classifier.classifier_input for classifier in found} or {"x0"}
        if len(inputs) > 1:
            raise ValueError(
                f"the classifiers {', '.join(self.architectures)} do not guide together: ResNets see the predicted x0, "
                "noise-aware ones x_t"
            )
        return Networks(unet, tuple(classifier.module for classifier in found), inputs.pop())
