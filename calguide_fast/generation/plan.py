"""The plan: which image has which seed and label, and how the images are cut into batches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calguide_fast.noise import as_seeds, draw_labels

BALANCED, RANDOM = "balanced", "random"
# what is kept of each in memory, from the start, is some hundred bytes
MOST_IMAGES = 10_000_000


@dataclass(frozen=True, eq=False)
class Plan:
    """N images, cut into batches of consecutive indices before anything is known of processes or machines.

    A batch is what is sampled, tilted, written and redone together, so that who samples it changes no byte of it.

    Attributes:
        labels: (N,) int64 on the CPU.
        seeds: (N,) int64 on the CPU, bit patterns of unsigned 64-bit seeds.
        batch_size: images in every batch but the last, which holds what is left.
    """

    labels: Tensor
    seeds: Tensor
    batch_size: int

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self.batch_size)

    def images(self, batch: int) -> slice:
        """Which images of the run the batch holds."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    @classmethod
    def of(
        cls, num_samples: int | None, batch_size: int, seeds: str | None, labels: str, num_classes: int, default: int
    ) -> Plan:
        """The plan that the command line's texts describe.

        Args:
            num_samples: N; None for as many as there are seeds.
            batch_size: images in a batch.
            seeds: N whole numbers like ``"0-49999"`` or ``"1,2,8-15"``; None for 0..N−1.
            labels: ``"balanced"``: image i is of class i mod C; ``"random"``: drawn from the image's own seed, by the
                stream that is reserved for it; or classes like ``"207,88"``, which the images take in turn.
            num_classes: C.
            default: N, if neither ``num_samples`` nor ``seeds`` is given.

        Raises:
            ValueError: a text is not understood, a number is out of its range, or there are other than N seeds.
        """
        for name, value in (("num-samples", num_samples), ("batch-size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        ranges = parse_integers("seeds", seeds) if seeds is not None else [range(num_samples or default)]
        # not by len, which has no number above 2⁶³
        count = sum(part.stop - part.start for part in ranges)
        if num_samples is not None and count != num_samples:
            raise ValueError(f"seeds {seeds} are {count} and num-samples is {num_samples}: each image needs one seed")
        if count > MOST_IMAGES:
            raise ValueError(f"{count} images are too many for one run, which takes {MOST_IMAGES}")
        chosen = as_seeds(list(itertools.chain(*ranges)), count)
        return cls(_labels(labels, chosen, num_classes), chosen, batch_size)


def _labels(text: str, seeds: Tensor, num_classes: int) -> Tensor:
    if text == RANDOM:
        return draw_labels(seeds, num_classes)
    index = torch.arange(len(seeds))
    if text == BALANCED:
        return index % num_classes
    try:
        ranges = parse_integers("labels", text)
    except ValueError as error:
        raise ValueError(f"{error}; or '{BALANCED}' or '{RANDOM}'") from None
    # before they are listed, as there may be any number of them
    last = max(part.stop for part in ranges) - 1
    if last >= num_classes:
        raise ValueError(f"labels={text!r} has {last}: labels must lie in 0..{num_classes - 1}")
    listed = torch.tensor(list(itertools.chain(*ranges)))
    return listed[index % len(listed)]


def canonical_labels(text: str) -> str:
    """One text for all that ask for the same labels."""
    return text if text in (BALANCED, RANDOM) else format_integers(itertools.chain(*parse_integers("labels", text)))


def parse_integers(name: str, text: str) -> list[range]:
    """``"7,0-3"`` as ranges, ends included."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{name} must be numbers and ranges like 0-49999 or 1,2,8-15, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{name}: the range {part.strip()} runs backwards")
        ranges.append(range(first, last + 1))
    return ranges


def format_integers(numbers: Iterable[int]) -> str:
    """The shortest such text: runs of consecutive numbers become ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
