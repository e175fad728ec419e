"""How far a run is, on stderr: a bar for a person who watches, a line now and then for a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """Images done of all, with images per second and the time that is left.

    Args:
        total: images of the run.
        done: images that earlier runs have done.
        show: whether to show anything, which is for one process of a team.
    """

    def __init__(self, total: int, done: int, show: bool = True) -> None:
        self.total, self.before, self._show = total, done, show
        self._sampled = 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit="image", disable=not (show and sys.stderr.isatty()))
        if self._bar.disable and done:
            self.say(f"{done} of {total} images are there")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, sampled: int) -> None:
        """Show that so many images have been sampled since the start, by all processes together."""
        if sampled == self._sampled:
            return
        self._bar.update(sampled - self._sampled)
        self._sampled = sampled
        now = time.monotonic()
        finished = self.before + sampled == self.total
        if self._bar.disable and (finished or now - self._last >= LINE_SECONDS):
            self._last = now
            rate = sampled / max(now - self._start, 1e-9)
            left = timedelta(seconds=round((self.total - self.before - sampled) / rate))
            self.say(f"{self.before + sampled} of {self.total} images, {rate:.3g} images/s, {left} left")

    def say(self, message: str) -> None:
        """A line that leaves the bar whole."""
        if self._show:
            tqdm.write(f"calguide-fast: {message}", file=sys.stderr)
