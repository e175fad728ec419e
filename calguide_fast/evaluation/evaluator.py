"""All figures of a set of samples at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calguide_fast.devices import usable_device
from calguide_fast.evaluation._features import check_same_width
from calguide_fast.evaluation.extractors import Extractor, extractor_name, import_extractor, source_sha256
from calguide_fast.evaluation.frechet import frechet_distance_from_statistics
from calguide_fast.evaluation.images import Images, ImagesLike, open_images
from calguide_fast.evaluation.inception import PUBLISHED_AT, PUBLISHED_HASH, Inception
from calguide_fast.evaluation.manifold import density_coverage, precision_recall
from calguide_fast.evaluation.measured import FRECHET, METRICS, NEIGHBOURS, Measured
from calguide_fast.evaluation.reference import Reference, open_reference
from calguide_fast.evaluation.score import SPLIT


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of samples, and what one must know to compare them with others.

    Attributes:
        metrics: each figure by its name.
        left_out: why each other figure that was asked for could not be taken.
        warnings: what makes a figure doubtful.
        protocol: how Inception saw the images; None for other features.
        extractor: the network of the features.
        weights_sha256: of Inception's file; None for other features.
        source_sha256: of the file that holds the code of other features, as :func:`source_sha256` has it.
        samples: images that were measured.
        reference_images: images that the network saw of the reference; None where its statistics were all it took.
        statistics_from: where the reference's statistics of each Fréchet distance come from, "file" or "images".
        neighbours: k of each figure that counts neighbours.
        split: samples of a split of the Inception score; None where that was not taken.
    """

    metrics: dict[str, float]
    left_out: dict[str, str]
    warnings: list[str]
    protocol: str | None
    extractor: str
    weights_sha256: str | None
    source_sha256: str | None
    samples: int
    reference_images: int | None
    statistics_from: dict[str, str]
    neighbours: dict[str, int]
    split: int | None


def evaluate(
    samples: ImagesLike,
    reference: ImagesLike,
    *,
    inception: str | Path | None = None,
    features: Extractor | str | None = None,
    protocol: str | None = None,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure `samples` against `reference`.

    FID and sFID compare with the statistics in the reference's file, as guided-diffusion's evaluator does, and with
    those of its images where the file has none. Figures that count neighbours compare with its images; of a file of
    statistics alone they are left out. sFID and the Inception score need an extractor that gives what they are of.

    Statistics are merged batch by batch in float64; what grows with the number of images is the features that
    neighbours are sought among.

    Args:
        samples: an .npz file with ``arr_0``, a folder of pictures or an array, as :func:`open_images` takes.
        reference: the same, or an .npz file of statistics, with or without images.
        inception: Inception's weights, see :class:`Inception`.
        features: instead of Inception, any callable (B, C, H, W) uint8 → (B, D) or ImageFeatures, called on `device`
            without gradients, or its name, "module:function".
        protocol: "adm" or "pytorch-fid", how Inception sees images; "adm" if None.
        metrics: names out of :data:`METRICS`.
        batch_size: images that the network sees together.
        device: where the network and the distances run; a GPU if None and there is one.
        progress: whether to show a bar on stderr.

    Warns:
        UserWarning: no more images than features, which leaves covariances singular and Fréchet distances far above
            what they would be of many; another Inception than the published one; or statistics of ADM's evaluator that
            are compared with samples as pytorch-fid sees them.

    Raises:
        FileNotFoundError, TypeError, ValueError, ImportError: unusable arguments, files or features; too few images for
            a metric (2 for Fréchet distances, 4 for precision and recall, 6 of the reference for density and coverage);
            or none of the metrics can be taken.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics={','.join(metrics)!r} must be some of {', '.join(METRICS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images, against = open_images(samples), open_reference(reference)
    left_out = {name: why for name in metrics if (why := _missing_of_reference(name, against))}
    wanted = [name for name in METRICS if name in metrics and name not in left_out]
    _check_not_empty(wanted, left_out)
    _check_counts(wanted, images, against)
    device = usable_device(device)
    extractor = _extractor(inception, features, protocol, device)
    source = source_sha256(extractor)

    fake = Measured(images, extractor, wanted, batch_size, device, "samples" if progress else None)
    left_out |= fake.missing
    wanted = [name for name in wanted if name not in left_out]
    _check_not_empty(wanted, left_out)
    of_images = _compared_with_images(wanted, against)
    real = None
    if of_images and against.images is not None:
        real = Measured(against.images, extractor, of_images, batch_size, device, "reference" if progress else None)

    doubts = [*_doubts_of(extractor), *_doubts_of_protocol(extractor, against, wanted)]
    doubts += [*_doubts_of_counts("samples", fake), *_doubts_of_counts("reference", real)]
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return Evaluation(
        metrics=_figures(wanted, fake, real, against, device),
        left_out=left_out,
        warnings=doubts,
        protocol=extractor.protocol if isinstance(extractor, Inception) else None,
        extractor=extractor_name(extractor),
        weights_sha256=extractor.sha256 if isinstance(extractor, Inception) else None,
        source_sha256=source,
        samples=fake.count,
        reference_images=None if real is None else real.count,
        statistics_from={name: "images" if name in of_images else "file" for name in wanted if name in FRECHET},
        neighbours={name: NEIGHBOURS[name] for name in wanted if name in NEIGHBOURS},
        split=SPLIT if "is" in wanted else None,
    )


def _missing_of_reference(metric: str, against: Reference) -> str | None:
    if metric == "is" or against.images is not None or against.statistics(metric) is not None:
        return None
    return f"the reference holds no images (arr_0){' and no statistics of it' if metric in FRECHET else ''}"


def _compared_with_images(metrics: Sequence[str], against: Reference) -> list[str]:
    return [name for name in metrics if name != "is" and against.statistics(name) is None]


def _check_not_empty(metrics: Sequence[str], left_out: dict[str, str]) -> None:
    if not metrics:
        raise ValueError(f"nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")


def _check_counts(metrics: Sequence[str], images: Images, against: Reference) -> None:
    """Raise where there are too few images for a metric, before the network sees any."""
    of_images = _compared_with_images(metrics, against)
    for name in metrics:
        least = NEIGHBOURS.get(name, 1) + 1
        if len(images) < least and name not in ("is", "density", "coverage"):
            raise ValueError(f"samples: {len(images)} images, but {name} needs at least {least}")
        if name in of_images and against.images is not None and len(against.images) < least:
            raise ValueError(f"reference: {len(against.images)} images, but {name} needs at least {least}")


def _extractor(
    inception: str | Path | None, features: Extractor | str | None, protocol: str | None, device: torch.device
) -> Extractor:
    if features is not None and inception is not None:
        raise ValueError(f"give either inception={str(inception)!r} or features={features!r}, not both")
    if features is not None and protocol is not None:
        raise ValueError(
            f"protocol={protocol!r} is how Inception sees images; features={features!r} see them as they are"
        )
    if features is not None:
        return import_extractor(features) if isinstance(features, str) else features
    if inception is None:
        raise ValueError(
            f"a network is needed: inception (--inception PATH), the weights published at {PUBLISHED_AT}, or features "
            "(--features module:function), your own"
        )
    return Inception(inception, protocol or "adm", device)


def _doubts_of(extractor: Extractor) -> list[str]:
    if not isinstance(extractor, Inception) or extractor.sha256.startswith(PUBLISHED_HASH):
        return []
    return [
        f"these are not Inception's published weights, whose SHA-256 begins with {PUBLISHED_HASH}: no figure compares "
        "with a published one"
    ]


def _doubts_of_protocol(extractor: Extractor, against: Reference, metrics: Sequence[str]) -> list[str]:
    # of all that write statistics, ADM's evaluator alone has those of sFID
    if not isinstance(extractor, Inception) or extractor.protocol == "adm" or against.sfid is None:
        return []
    return [
        f"{name}: samples as {extractor.protocol} sees them are compared with the statistics in the reference's file, "
        "which are of ADM's evaluator: the distance holds the difference of the two protocols"
        for name in FRECHET
        if name in metrics and against.statistics(name) is not None
    ]


def _doubts_of_counts(side: str, measured: Measured | None) -> list[str]:
    if measured is None:
        return []
    return [
        f"{name}: {measured.count} images ({side}) for {statistics.width} features: their covariance is singular, and "
        "the distance far above that of many images"
        for name, statistics in measured.statistics.items()
        if measured.count <= statistics.width
    ]


def _figures(
    metrics: Sequence[str], fake: Measured, real: Measured | None, against: Reference, device: torch.device
) -> dict[str, float]:
    of_reference = {name: statistics for name in FRECHET if (statistics := against.statistics(name)) is not None}
    if real is not None:
        of_reference |= {name: statistics.result() for name, statistics in real.statistics.items()}
    found: dict[str, float] = {}
    for name in metrics:
        if name in FRECHET:
            ours, theirs = fake.statistics[name].result(), of_reference[name]
            check_same_width(ours.mu, theirs.mu, f"{name}: a sample", "the reference")
            found[name] = frechet_distance_from_statistics(*ours, *theirs)
    if fake.score is not None and "is" in metrics:
        found["is"] = fake.score.result()
    if real is not None and any(name in NEIGHBOURS for name in metrics):
        tables, home = (real.table(), fake.table()), "cpu" if device.type == "mps" else device
        if "precision" in metrics or "recall" in metrics:
            found |= precision_recall(*tables, NEIGHBOURS["precision"], device=home)._asdict()
        if "density" in metrics or "coverage" in metrics:
            found |= density_coverage(*tables, NEIGHBOURS["density"], device=home)._asdict()
    return {name: found[name] for name in metrics}
