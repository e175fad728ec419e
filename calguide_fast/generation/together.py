"""Work that processes share, from the first signal handler to the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

from torch import distributed

from calguide_fast.demo.threads import one_thread
from calguide_fast.generation.interrupts import Interrupted, Interrupts
from calguide_fast.generation.presets import DIGITS
from calguide_fast.generation.team import Team, TeammateFailed


def together(work: Callable[[Team], object], preset: str, how_to_go_on: str) -> int:
    """Do this process's share of the work, alone or as one of torchrun's processes; returns the exit status.

    Args:
        work: called with the team; what it raises is told to the others.
        preset: of the networks.
        how_to_go_on: said after a signal, or where another process gave up.
    """
    with Interrupts(say if int(os.environ.get("RANK", 0)) == 0 else _silence) as interrupts:
        team = Team.from_environment(interrupts)
        try:
            # networks as small as the digits' are quickest, and the same in every process, on one thread
            with one_thread() if preset == DIGITS else nullcontext():
                work(team)
            team.leave()
        except Interrupted as stop:
            team.fail(str(stop))
            if team.rank == 0:
                say(f"{stop}; {how_to_go_on}")
            return stop.status
        except TeammateFailed as failure:
            if team.rank == 0:
                say(f"{failure}; {how_to_go_on}")
            return 1
        except distributed.DistError as error:
            # as when the launcher was killed, which keeps the store
            say(f"the store that the processes of this run share does not answer: {error}; {how_to_go_on}")
            return 1
        except BaseException as error:
            # some have nothing to say, as where there is no memory
            team.fail(str(error) or type(error).__name__)
            raise
    return 0


def say(message: str) -> None:
    """A line on stderr."""
    print(f"calguide-fast: {message}", file=sys.stderr, flush=True)


def _silence(_: str) -> None:
    pass
