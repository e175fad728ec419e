"""What samples are measured against: images, or statistics of images, or both in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from calguide_fast.evaluation.images import PIXELS, Images, ImagesLike, open_images
from calguide_fast.evaluation.statistics import FeatureStatistics
from calguide_fast.npz import array_names, read_array

STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """The images of a reference, and the statistics that came with it, where there are any.

    Statistics are of as many images as their maker took (OpenAI's: the whole data set), the images of a file may be
    fewer (OpenAI's: 10,000).
    """

    images: Images | None = None
    fid: FeatureStatistics | None = None
    sfid: FeatureStatistics | None = None

    def statistics(self, metric: str) -> FeatureStatistics | None:
        """What came for a metric."""
        return {"fid": self.fid, "sfid": self.sfid}.get(metric)


def open_reference(source: ImagesLike) -> Reference:
    """A reference batch of OpenAI's, a statistics file (also pytorch-fid's), or images as :func:`open_images` takes.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`open_images`, or a file that holds neither images nor
            statistics.
    """
    if not isinstance(source, str | Path) or Path(source).is_dir():
        return Reference(open_images(source))
    path = Path(source)
    names = array_names(path)
    statistics = {
        metric: FeatureStatistics(*(torch.from_numpy(read_array(path, name)) for name in pair))
        for metric, pair in STATISTICS.items()
        if set(pair) <= set(names)
    }
    if PIXELS not in names and not statistics:
        raise ValueError(
            f"{path} holds {', '.join(names) or 'nothing'}; a reference must hold images ({PIXELS}) or statistics "
            f"({', '.join(name for pair in STATISTICS.values() for name in pair)})"
        )
    return Reference(open_images(path) if PIXELS in names else None, **statistics)
