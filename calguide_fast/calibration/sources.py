"""Where the commands ``reliability`` and ``calibrate`` take predictions from: the options, and what they lead to."""

from __future__ import annotations

import argparse
from pathlib import Path

from calguide_fast.calibration import files, images
from calguide_fast.calibration.files import Predictions, read_predictions
from calguide_fast.calibration.images import open_images
from calguide_fast.calibration.inference import DEFAULT_LEVELS, PREPROCESSING, Classified, Inference
from calguide_fast.calibration.predictions import top_label
from calguide_fast.devices import usable_device
from calguide_fast.models import PRESETS, load_classifier
from calguide_fast.schedule import Schedule

EPILOG = f"FILE holds {files.ACCEPTED}"


def add_source_options(command: argparse.ArgumentParser) -> None:
    """The file of predictions, or the classifier and the images that it is run over."""
    command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="an .npz or .csv of predictions; see below")
    source = command.add_argument_group("predictions of a classifier, in place of FILE", f"DATA is {images.ACCEPTED}")
    source.add_argument(
        "--classifier",
        metavar="NAME:PATH",
        help="a checkpoint: resnet18 … resnet152 with torchvision's keys (resnet50:weights.pth), or a noise-aware ADM "
        f"classifier ({', '.join(PRESETS)})",
    )
    source.add_argument("--data", type=Path, metavar="DATA", help="labelled images; see below")
    source.add_argument(
        "--preprocess",
        choices=PREPROCESSING,
        help=f"pixels in [-1, 1], which guidance shows it, or torchvision's mean and standard deviation "
        f"({Inference.preprocess})",
    )
    source.add_argument(
        "--resize",
        type=int,
        metavar="N",
        help="shorter side to N pixels, then the middle square (ADM classifiers: their own size; ResNets: no change)",
    )
    source.add_argument("--batch-size", type=int, metavar="N", help=f"images at a time ({Inference.batch_size})")
    source.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU where there is one)")
    source.add_argument(
        "--softplus-beta", type=float, metavar="B", help="a ResNet's ReLUs become Softplus(B), as for guidance"
    )
    source.add_argument(
        "--noise-levels",
        type=int,
        nargs="+",
        default=(),
        metavar="T",
        help="noise the images to these timesteps of the diffusion (clean images for a ResNet, "
        f"{DEFAULT_LEVELS} levels for a noise-aware classifier, which is of (x_t, t))",
    )
    source.add_argument("--save-logits", type=Path, metavar="NPZ", help="keep logits and labels, to be read as a FILE")


_OF_INFERENCE = ("preprocess", "batch_size")
_OF_CLASSIFIER = ("data", *_OF_INFERENCE, "resize", "device", "softplus_beta", "noise_levels", "save_logits")


class Source:
    """What :func:`add_source_options`' options say.

    Raises:
        FileNotFoundError, ValueError: options that do not go together, and as :func:`load_classifier`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.classifier is None:
            idle = [name for name in _OF_CLASSIFIER if getattr(options, name) not in (None, ())]
            if idle:
                raise ValueError(f"--{idle[0].replace('_', '-')} goes with --classifier NAME:PATH, which is not given")
            if options.file is None:
                raise ValueError("give a FILE of predictions, or --classifier NAME:PATH with --data DATA")
            self.inference = None
            return
        if options.file is not None or options.data is None:
            raise ValueError("--classifier goes with --data DATA, and with no FILE of predictions")
        if options.save_logits is not None and options.save_logits.suffix != ".npz":
            raise ValueError(f"--save-logits {options.save_logits} must be an .npz file")
        given = {name: value for name in _OF_INFERENCE if (value := getattr(options, name)) is not None}
        self.inference = Inference(
            load_classifier(options.classifier, options.softplus_beta),
            timesteps=options.noise_levels,
            device=usable_device(options.device),
            **given,
        )

    @property
    def noised(self) -> bool:
        return self.inference is not None and (self.inference.noise_aware or bool(self.options.noise_levels))

    @property
    def schedule(self) -> Schedule:
        """Of the noise."""
        assert self.inference is not None
        return self.inference.schedule

    def classified(self, data: Path | None = None) -> Classified:
        """The classifier's logits of these images; of the options' own ones, kept where the options say, if None."""
        assert self.inference is not None
        preset = self.inference.classifier.preset
        resize = (
            PRESETS[preset].image_size if preset is not None and self.options.resize is None else self.options.resize
        )
        found = self.inference.classify(open_images(data or self.options.data, resize), progress=True)
        if data is None and self.options.save_logits is not None:
            found.save(self.options.save_logits)
        return found

    def predictions(self, path: Path | None = None) -> Predictions:
        """All predictions in a file, or of images at all noise levels; those that the options name if None."""
        if self.inference is None:
            return read_predictions(path or self.options.file)
        found = self.classified(path)
        logits, labels = found.logits.flatten(0, 1), found.labels.repeat(len(found.logits))
        return Predictions(*top_label(logits, labels), logits, labels)
