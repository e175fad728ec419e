"""SIGINT and SIGTERM, put off until the batch in hand is done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def at_once() -> Iterator[None]:
    """Signals end the process, for a wait outside of Python, which no handler of Python's can end."""
    handlers = {signum: handler for signum in SIGNALS if callable(handler := signal.getsignal(signum))}
    for signum in handlers:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


class Interrupted(Exception):
    """A signal asked the process to stop, and this is a good moment."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum  # what shells call a process that a signal ended


class Interrupts:
    """While entered, the first signal is remembered for :meth:`check`; the second acts as it would without.

    Args:
        say: told once, when the signal comes.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {signum: signal.signal(signum, self._catch) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._caught is not None:
            raise Interrupted(self._caught)

    def _catch(self, signum: int, _: FrameType | None) -> None:
        self._caught = signum
        self._restore()
        self._say(f"{signal.Signals(signum).name}: the batch in hand is finished first; once more stops at once")

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
