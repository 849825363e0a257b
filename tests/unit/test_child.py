"""How the processes of an engine wait for each other on a CPU host."""

from __future__ import annotations

import pytest
from clock import Clock

from xinf_vllm_backend.engine.seams import child

LOOK = 1e-6  # seconds between two naps of one wait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(1000.0)
    monkeypatch.setattr(child.time, "monotonic", made)
    return made


def naps(clock: Clock, monkeypatch: pytest.MonkeyPatch, *waits: float, between: float = 0.01) -> list[list[float]]:
    """Seconds of each nap in waits that are over after ``waits`` seconds, and begin ``between`` seconds apart."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    def spin() -> None:
        slept.append(0.0)
        clock.now += LOOK

    monkeypatch.setattr(child.time, "sleep", sleep)
    nap, found = child.napping(spin), []
    for wait in waits:
        slept.clear()
        end = clock.now + wait
        while clock.now < end:
            clock.now += LOOK
            nap()
        found.append(list(slept))
        clock.now += between
    return found


def test_a_short_wait_spins(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = naps(clock, monkeypatch, child.SPINS / 2, child.SPINS / 2)
    assert first and set(first + second) == {0.0}


def test_a_longer_one_naps_for_a_share_of_what_it_has_waited(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = naps(clock, monkeypatch, 0.003)
    slept = [nap for nap in found if nap]
    assert slept == sorted(slept)
    assert slept[0] == pytest.approx(child.OVERSHOOT * child.SPINS, rel=0.2)
    assert slept[-1] <= child.OVERSHOOT * 0.003


def test_no_nap_is_longer_than_the_longest(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = naps(clock, monkeypatch, 0.1)
    assert max(found) == child.NAP


def test_each_wait_begins_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = naps(clock, monkeypatch, 0.1, child.SPINS / 2)
    assert max(long) > 0 and set(short) == {0.0}
