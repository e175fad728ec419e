"""What the metrics need of one set of images, collected while the network sees each image once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from calguide_fast.evaluation.extractors import Extractor, ImageFeatures, extract
from calguide_fast.evaluation.images import Images
from calguide_fast.evaluation.score import StreamingInceptionScore
from calguide_fast.evaluation.statistics import StreamingStatistics

FRECHET = ("fid", "sfid")
# the k of the nearest neighbours, as the papers have it
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
METRICS = (*FRECHET, "is", *NEIGHBOURS)


class Measured:
    """Statistics, scores and, for neighbours alone, the features themselves.

    Args:
        images: what is measured.
        extractor: the network.
        metrics: names out of :data:`METRICS`, for which something is to be collected.
        batch_size: images that the network sees together.
        device: where it runs.
        title: of the bar on stderr; None for no bar.

    Attributes:
        count: of the images.
        statistics: of each Fréchet distance.
        score: the Inception score, if it is among the metrics.
        missing: why the extractor cannot serve some of the metrics.
    """

    def __init__(
        self,
        images: Images,
        extractor: Extractor,
        metrics: Sequence[str],
        batch_size: int,
        device: torch.device,
        title: str | None,
    ):
        self.count = len(images)
        self.statistics = {name: StreamingStatistics() for name in metrics if name in FRECHET}
        self.score = StreamingInceptionScore() if "is" in metrics else None
        self.missing: dict[str, str] = {}
        self._keep = any(name in NEIGHBOURS for name in metrics)
        self._tables: list[Tensor] = []
        # a person watches a terminal; in a log, a line now and then will do
        seconds = 0.1 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=self.count, desc=title, unit="image", disable=title is None, file=sys.stderr, mininterval=seconds
        ) as bar:
            for batch in images.batches(batch_size):
                self._update(extract(extractor, batch.to(device)))
                bar.update(len(batch))

    def _update(self, found: ImageFeatures) -> None:
        if self._keep:
            self._tables.append(found.features.cpu())
        for name, table in (("fid", found.features), ("sfid", found.spatial)):
            if name in self.statistics:
                if table is None:
                    self.missing[name] = "the extractor gives no spatial features"
                else:
                    self.statistics[name].update(table)
        if self.score is not None:
            if found.logits is None:
                self.missing["is"] = "the extractor gives no logits"
            else:
                self.score.update(found.logits)

    def table(self) -> Tensor:
        """All features (N, D), on the CPU."""
        # one tensor from here on: the batches beside it would double the memory
        self._tables = [torch.cat(self._tables)]
        return self._tables[0]
