"""What faults cost the requests: those that were in flight, lost or wrong, and how long a stream was silent."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COLUMNS = ("fault", "times", "in flight", "lost", "wrong", "longest stall", "answers again", "at worst")
BEFORE = "before any fault"


@dataclass(frozen=True)
class Trouble:
    """A request that went wrong.

    Attributes:
        request: its name.
        begun: time.monotonic().
        ended: time.monotonic().
        what: what was expected and got, or the error.
    """

    request: str
    begun: float
    ended: float
    what: str


@dataclass
class Strike:
    """A fault that was done.

    Attributes:
        name: of the kind.
        victim: in words.
        at: time.monotonic().
        in_flight: requests that were.
        back: seconds until requests were answered again; None if they were not.
    """

    name: str
    victim: str
    at: float
    in_flight: int = 0
    back: float | None = None


class Gap(NamedTuple):
    """A time without a chunk of a stream, which went on then; all by time.monotonic().

    Attributes:
        begun: the request.
        since: the chunk before, or the request.
        until: the next chunk.
    """

    begun: float
    since: float
    until: float


@dataclass
class Cost:
    """Of all faults of a kind.

    Attributes:
        times: how many there were.
        in_flight: requests that were at the fault, of all of them.
        lost: requests that failed, or whose stream was cut, until the next fault.
        wrong: the same for answers that are not as expected.
        stall: seconds; the longest silence after the fault of a stream that ran at it and went on.
        back: seconds until requests were answered again, of each.
    """

    times: int = 0
    in_flight: int = 0
    lost: int = 0
    wrong: int = 0
    stall: float = 0.0
    back: list[float] = field(default_factory=list)


def costs(
    strikes: Sequence[Strike], lost: Iterable[Trouble], wrong: Iterable[Trouble], gaps: Iterable[Gap]
) -> dict[str, Cost]:
    """The cost of each kind of fault; ``strikes`` are in the order of time."""
    found: dict[str, Cost] = {}
    for strike in strikes:
        cost = found.setdefault(strike.name, Cost())
        cost.times += 1
        cost.in_flight += strike.in_flight
        cost.back += [] if strike.back is None else [strike.back]
    for trouble in lost:
        found.setdefault(_last(strikes, trouble.ended), Cost()).lost += 1
    for trouble in wrong:
        found.setdefault(_last(strikes, trouble.ended), Cost()).wrong += 1
    stalls = _stalls(strikes, list(gaps))
    for strike, stall in zip(strikes, stalls, strict=True):
        found[strike.name].stall = max(found[strike.name].stall, stall)
    return found


def _last(strikes: Sequence[Strike], when: float) -> str:
    return next((strike.name for strike in reversed(strikes) if strike.at <= when), BEFORE)


def _stalls(strikes: Sequence[Strike], gaps: Sequence[Gap]) -> list[float]:
    """Of each fault, up to the next."""
    ends = [strike.at for strike in strikes[1:]] + [math.inf]
    return [
        max((gap.until - max(gap.since, strike.at) for gap in gaps if _is_of(gap, strike.at, end)), default=0.0)
        for strike, end in zip(strikes, ends, strict=True)
    ]


def _is_of(gap: Gap, at: float, end: float) -> bool:
    return gap.begun < at < gap.until and gap.since < end


def table(found: dict[str, Cost]) -> str:
    """A line for each kind of fault, as Markdown."""
    lines = [COLUMNS, ("--",) * len(COLUMNS), *itertools.starmap(_line, found.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(name: str, cost: Cost) -> tuple[str, ...]:
    counts = (cost.times, cost.in_flight, cost.lost, cost.wrong)
    back = (f"{statistics.median(cost.back):.1f} s", f"{max(cost.back):.1f} s") if cost.back else ("never", "never")
    return (name, *map(str, counts), f"{cost.stall:.1f} s", *back)
