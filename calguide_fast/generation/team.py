"""The processes that share a run, started by ``torchrun`` or as one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import distributed

from calguide_fast.generation.interrupts import Interrupts, at_once

Item = TypeVar("Item")

POLL_SECONDS = 0.05
LEAVE_SECONDS = 60.0  # until nobody is waited for any more


class TeammateFailed(RuntimeError):
    """Another process of the team gave up, and said why."""


class Team:
    """What processes tell each other: small things, through the key-value store of torch.distributed's rendezvous.

    There is no process group: images go to files, not to other processes, so there is nothing for NCCL or gloo to
    carry. The processes wait for each other at the end alone, hours if need be, and CUDA graphs, which a group's
    watchdog would break off, can be recorded.

    Args:
        interrupts: looked at while waiting.
        rank, size: this process, of how many.
        store: of the team; one of its own for a process that is alone.
    """

    def __init__(
        self, interrupts: Interrupts, rank: int = 0, size: int = 1, store: distributed.Store | None = None
    ) -> None:
        self.interrupts, self.rank, self.size = interrupts, rank, size
        self._store = self._shared = distributed.HashStore() if store is None else store

    @classmethod
    def from_environment(cls, interrupts: Interrupts) -> Team:
        """The team that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, as ``torchrun`` sets them.

        Raises ConnectionError where its processes do not find each other.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls(interrupts)
        try:
            with at_once():
                store, rank, size = next(distributed.rendezvous("env://"))
        except distributed.DistError as error:
            raise ConnectionError(f"the processes of this run did not find each other: {error}") from error
        return cls(interrupts, rank, size, distributed.PrefixStore("calguide_fast", store))

    def part(self, name: str) -> Team:
        """The same processes at one piece of work among several: values and counts are its own, failures are not."""
        part = Team(self.interrupts, self.rank, self.size, distributed.PrefixStore(name, self._store))
        part._shared = self._shared
        return part

    def from_first(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, as JSON keeps it, on every rank."""
        if self.rank == 0:
            self._store.set(name, json.dumps(work()))
        return self._wait_for(name)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0; others get an empty list at once."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        return [self._wait_for(f"{name}/{rank}") for rank in range(self.size)] if self.rank == 0 else []

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """Items, each to whichever rank asks next, so that a slow machine takes fewer. All ranks give the same ones."""
        while (position := self._store.add("dealt", 1) - 1) < len(items):
            yield items[position]

    def add(self, name: str, count: int) -> int:
        """Add to a count that all ranks share, and return it."""
        return self._store.add(name, count)

    def wait_for_count(self, name: str, count: int) -> None:
        """Wait until a shared count is reached."""
        while self._store.add(name, 0) < count:
            self._pause()

    def leave(self) -> None:
        """Say that this process needs the team no more; rank 0, which may keep the store, waits until all have.

        Not for ever: one may have died with its work done.
        """
        left = self._shared.add("left", 1)
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.rank == 0 and left < self.size and time.monotonic() < deadline:
            self._pause()
            left = self._shared.add("left", 0)

    def fail(self, reason: str) -> None:
        """Tell the others to stop."""
        # a store that is gone went with the launcher, and then nobody is left to be told
        with contextlib.suppress(RuntimeError):
            self._shared.set("failure", f"rank {self.rank}: {reason}")

    def check(self) -> None:
        """Raises Interrupted if a signal has come, or TeammateFailed if another rank has given up."""
        self.interrupts.check()
        if self._shared.check(["failure"]):
            raise TeammateFailed(self._shared.get("failure").decode())

    def _wait_for(self, name: str) -> Any:
        while not self._store.check([name]):
            self._pause()
        return json.loads(self._store.get(name))

    def _pause(self) -> None:
        self.check()
        time.sleep(POLL_SECONDS)
