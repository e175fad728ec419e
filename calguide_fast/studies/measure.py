"""How every point of a study is measured: features against a reference, and a judge's opinion of the class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from calguide_fast.calibration.images import open_images
from calguide_fast.calibration.inference import Inference
from calguide_fast.evaluation.evaluator import evaluate
from calguide_fast.evaluation.extractors import Extractor, extractor_name, import_extractor, source_sha256
from calguide_fast.evaluation.images import ImagesLike
from calguide_fast.evaluation.inception import Inception
from calguide_fast.evaluation.reference import open_reference
from calguide_fast.generation.settings import Settings, file_hash
from calguide_fast.models.specs import LoadedClassifier, load_classifier

METRICS = ("fid", "precision", "recall")
JUDGE_PIXELS = 224  # what torchvision's ResNets are trained and tested with


@dataclass(frozen=True)
class Judge:
    """A classifier that guides nothing, and says of which class a sample is.

    Attributes:
        classifier: with its weights.
        name: of it, and its weights' SHA-256 where they come from a file.
        resize: pixels that images are brought to; None leaves them.
        preprocess: as `Inference` has it.
    """

    classifier: LoadedClassifier
    name: str
    resize: int | None = None
    preprocess: str = "minus-one-one"

    @classmethod
    def of(cls, spec: str) -> Judge:
        """What ``NAME:PATH`` names.

        A ResNet sees images at 224 pixels, normalised as torchvision's are; a noise-aware one as they are, at t = 0.

        Raises FileNotFoundError or ValueError as `load_classifier`.
        """
        classifier = load_classifier(spec)
        name, _, path = spec.partition(":")
        name = f"{name} {file_hash(Path(path).expanduser())}"
        if classifier.classifier_input == "xt":
            return cls(classifier, name)
        return cls(classifier, name, JUDGE_PIXELS, "imagenet")

    def accuracy(self, samples: Path, batch_size: int, device: str | torch.device) -> float:
        """The share of an .npz file's images that are of their label's class."""
        timesteps = (0,) if self.classifier.classifier_input == "xt" else ()
        inference = Inference(self.classifier, self.preprocess, timesteps, batch_size, device)
        found = inference.classify(open_images(samples, self.resize))
        return (found.logits[0].argmax(1) == found.labels).double().mean().item()


@dataclass(frozen=True)
class Measure:
    """Measures samples, always in the same way.

    Attributes:
        reference: images, or a file of them or of their statistics, as `evaluate` takes.
        reference_name: what figures are kept under: another reference is another measure.
        features: an extractor, its name ``module:function``, or the path of Inception's weights.
        protocol: how Inception sees images.
        judge: whose opinion the class accuracy is; None leaves it out.
        metrics: of `evaluate`.
        batch_size: images at a time.
        device: of the networks.
    """

    reference: ImagesLike
    reference_name: str
    features: Extractor | str | Path
    protocol: str = "adm"
    judge: Judge | None = None
    metrics: Sequence[str] = METRICS
    batch_size: int = 64
    device: str | torch.device = "cpu"

    @cached_property
    def extractor(self) -> Extractor:
        """The network of the features, loaded once."""
        if isinstance(self.features, Path):
            return Inception(self.features, self.protocol, self.device)
        return import_extractor(self.features) if isinstance(self.features, str) else self.features

    @cached_property
    def settings(self) -> Settings:
        """All that decides the figures of given samples."""
        inception = isinstance(self.features, Path)
        source = source_sha256(self.extractor)
        return {
            "reference": self.reference_name,
            "features": extractor_name(self.extractor, self.features if isinstance(self.features, str) else None),
            "weights_sha256": file_hash(self.features) if isinstance(self.features, Path) else None,
            # of features of the user's own alone, so that others' figures need no new measurement
            **({} if source is None else {"source_sha256": source}),
            "protocol": self.protocol if inception else None,
            "judge": None if self.judge is None else self.judge.name,
            "metrics": list(self.metrics),
        }

    def check(self) -> None:
        """Load and open all there is, so that what is wrong is found before hours of sampling; raises as `evaluate`."""
        open_reference(self.reference)
        _ = self.settings

    def __call__(self, samples: Path) -> dict[str, Any]:
        """``figures`` of an .npz file that ``sample`` wrote, by their names, and what `evaluate` says beside them.

        Raises as `evaluate` and `Judge.accuracy`.
        """
        with warnings.catch_warnings():
            # they are among what is returned
            warnings.simplefilter("ignore", UserWarning)
            evaluation = evaluate(
                samples,
                self.reference,
                features=self.extractor,
                metrics=self.metrics,
                batch_size=self.batch_size,
                device=self.device,
                progress=False,
            )
        found = asdict(evaluation)
        figures = found.pop("metrics")
        if self.judge is not None:
            figures["accuracy"] = self.judge.accuracy(samples, self.batch_size, self.device)
        return {"figures": figures, **{name: value for name, value in found.items() if value}}
