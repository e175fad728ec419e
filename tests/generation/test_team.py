"""What the processes of a run tell each other, here two of them over one store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from torch import distributed

from calguide_fast.generation import team as team_module
from calguide_fast.generation.interrupts import Interrupted, Interrupts
from calguide_fast.generation.team import Team, TeammateFailed


@pytest.fixture
def pair():
    store, interrupts = distributed.HashStore(), Interrupts(lambda _: None)
    return Team(interrupts, 0, 2, store), Team(interrupts, 1, 2, store)


def test_items_go_to_whoever_asks(pair):
    first, second = (team.deal("abcde") for team in pair)
    assert [next(first), next(second), next(second), *first, *second] == list("abcde")


def test_what_rank_0_finds_is_known_to_all(pair):
    first, second = pair
    found = first.from_first("settings", lambda: {"interval": (1.0, float("inf"))})
    assert (
        found == second.from_first("settings", lambda: pytest.fail("rank 1 works")) == {"interval": [1.0, float("inf")]}
    )
    assert second.gather("device", "b") == [] and first.gather("device", "a") == ["a", "b"]
    assert first.add("images", 3) == 3 and second.add("images", 2) == 5


def test_parts_share_failures_alone(pair):
    parts = [[team.part(name) for team in pair] for name in "12"]
    for first, second in parts:
        assert [*first.deal("ab")] == ["a", "b"] and [*second.deal("ab")] == []
        assert first.from_first("x", "answer".upper) == second.from_first("x", int)
    parts[0][1].fail("lost")
    for team in (*pair, *parts[0], *parts[1]):
        with pytest.raises(TeammateFailed, match="^rank 1: lost$"):
            team.check()


def test_what_a_silent_process_had_in_hand_comes_forth(pair, monkeypatch):
    first, second = pair
    dealt = [team.deal("abcdef") for team in pair]
    in_hand = [next(dealt[1]) for _ in "ab"]
    for item in dealt[0]:
        assert first.done(item)
    assert in_hand == ["a", "b"] and not first.is_done("a") and first.is_done("f")
    # as long as somebody finishes something in time, nobody is believed dead
    waits = iter([lambda: None, lambda: second.done("a"), lambda: time.sleep(0.3), lambda: None])
    monkeypatch.setattr(first, "_pause", lambda: next(waits)())
    # nor does it matter what was known of a batch's time before one was done
    patience = iter([60.0, 0.2, 0.2])
    overdue = first.overdue("abcdef", lambda: next(patience))
    assert next(overdue) == "b" and len(list(waits)) == 1
    assert first.done("b") and not second.done("b")  # who comes to life again is late
    monkeypatch.setattr(first, "_pause", lambda: None)
    assert list(overdue) == [] == list(first.overdue("abcdef", lambda: 60.0))


def test_a_process_that_never_speaks_is_waited_for_once(pair, monkeypatch):
    first, second = pair
    monkeypatch.setattr(team_module, "COME_SECONDS", 0.1)
    assert first.gather("device", "a") == ["a", None] and first.silent == {1}
    monkeypatch.setattr(team_module, "COME_SECONDS", 600.0)
    part, other = (team.part("2") for team in pair)
    assert part.gather("device", "a") == ["a", None]
    assert other.gather("device", "b") == [] and part.gather("device", "a") == ["a", "b"] and first.silent == set()


def test_who_waits_hears_of_a_failure(pair):
    first, second = pair
    second.check()
    first.fail("No space left on device: 'a.npy'")
    for wait in (second.check, lambda: second.from_first("x", int), lambda: next(second.overdue("a", lambda: 60.0))):
        with pytest.raises(TeammateFailed, match="^rank 0: No space left on device: 'a.npy'$"):
            wait()


def test_who_waits_hears_of_a_signal(request):
    said = []
    # a job in the background is started with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Interrupts(said.append) as interrupts:
        team = Team(interrupts)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT") as stop:
            next(team.overdue("a", lambda: 60.0))
        assert stop.value.status == 130 and len(said) == 1
        # the second acts as ever
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_rank_0_leaves_last(pair, monkeypatch):
    """Its process may keep the store, which the others have still to hear from."""
    first, second = pair
    waits = iter([lambda: None, second.leave])
    monkeypatch.setattr(first, "_pause", lambda: next(waits)())
    first.leave()
    assert next(waits, None) is None
    # who died is not waited for until the end of time
    lonely = Team(first.interrupts, 0, 2, distributed.HashStore())
    monkeypatch.setattr(team_module, "LEAVE_SECONDS", 0.1)
    lonely.leave()


COMES = """
from calguide_fast.generation.interrupts import Interrupts
from calguide_fast.generation.team import Team
with Interrupts(print) as interrupts:
    Team.from_environment(interrupts)
"""


def test_who_waits_for_the_others_to_come_can_be_stopped():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-c", COMES], env={**os.environ, **alone})
    try:
        deadline = time.monotonic() + 60
        while not listens(port):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
    finally:
        process.kill()


def listens(port: int) -> bool:
    with socket.socket() as knocking:
        return knocking.connect_ex(("127.0.0.1", port)) == 0


def test_processes_that_do_not_find_each_other_are_one_line(monkeypatch):
    def lost(_):
        raise distributed.DistStoreError("Timed out")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "rendezvous", lost)
    with pytest.raises(ConnectionError, match="did not find each other: Timed out"):
        Team.from_environment(Interrupts(print))


def test_alone_there_is_no_launcher_to_ask(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team.from_environment(Interrupts(print))
    assert (team.rank, team.size, list(team.deal("abc")), team.gather("x", 1)) == (0, 1, list("abc"), [1])
