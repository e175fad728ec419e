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
COME_SECONDS = 300.0  # until who has not spoken yet, as while it loads its networks, is not waited for any more
LEAVE_SECONDS = 60.0  # until nobody is waited for any more


class TeammateFailed(RuntimeError):
    """Another process of the team gave up, and said why."""


class Team:
    """What processes tell each other: small things, through the key-value store of torch.distributed's rendezvous.

    There is no process group: images go to files, not to other processes, so there is nothing for NCCL or gloo to
    carry. The processes wait for each other at the end alone, hours if need be, and CUDA graphs, which a group's
    watchdog would break off, can be recorded. Whoever dies without a word is missed by nobody: rank 0 goes on without
    what it would have said, and is given what it had in hand.

    Args:
        interrupts: looked at while waiting.
        rank, size: this process, of how many.
        store: of the team; one of its own for a process that is alone.

    Attributes:
        silent: on rank 0, the ranks that were waited for once in vain.
    """

    def __init__(
        self, interrupts: Interrupts, rank: int = 0, size: int = 1, store: distributed.Store | None = None
    ) -> None:
        self.interrupts, self.rank, self.size = interrupts, rank, size
        self._store = self._shared = distributed.HashStore() if store is None else store
        self.silent: set[int] = set()

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
        part._shared, part.silent = self._shared, self.silent
        return part

    def from_first(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, as JSON keeps it, on every rank."""
        if self.rank == 0:
            self._store.set(name, json.dumps(work()))
        return self._wait_for(name)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0, None of silent ranks; others get an empty list at once."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return []
        deadline = time.monotonic() + COME_SECONDS
        return [self._said_by(rank, name, deadline) for rank in range(self.size)]

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """Items, each to whichever rank asks next, so that a slow machine takes fewer. All ranks give the same ones."""
        while (position := self._store.add("dealt", 1) - 1) < len(items):
            yield items[position]

    def done(self, item: Item) -> bool:
        """Say that a dealt item is done; False if somebody had said so before."""
        return self._store.add(f"done/{item}", 1) == 1

    def is_done(self, item: Item) -> bool:
        """Whether anybody has done an item."""
        return self._store.add(f"done/{item}", 0) > 0

    def overdue(self, items: Sequence[Item], patience: Callable[[], float]) -> Iterator[Item]:
        """Wait until all items are done, whoever does them; those that are not come forth to be done here.

        Args:
            items: as they were dealt.
            patience: seconds in which nobody has done any, after which whoever has them is believed dead; asked again
                after each that is done. One who is alive is in no way disturbed.
        """
        left, deadline = self._undone(items), time.monotonic() + patience()
        while left:
            self._pause()
            before, left = left, self._undone(left)
            if len(left) < len(before):
                deadline = time.monotonic() + patience()
            elif time.monotonic() > deadline:
                yield from (item for item in left if not self.is_done(item))

    def add(self, name: str, count: int) -> int:
        """Add to a count that all ranks share, and return it."""
        return self._store.add(name, count)

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

    def _undone(self, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if not self.is_done(item)]

    def _said_by(self, rank: int, name: str, deadline: float) -> Any:
        while not self._store.check([f"{name}/{rank}"]):
            if rank in self.silent or time.monotonic() > deadline:
                self.silent.add(rank)
                return None
            self._pause()
        self.silent.discard(rank)
        return json.loads(self._store.get(f"{name}/{rank}"))

    def _wait_for(self, name: str) -> Any:
        while not self._store.check([name]):
            self._pause()
        return json.loads(self._store.get(name))

    def _pause(self) -> None:
        self.check()
        time.sleep(POLL_SECONDS)
