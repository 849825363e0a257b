"""Which request kills engines: found among many by few further deaths, while the innocent ones are not kept waiting.

A request at which engines died again and again without progress is a suspect. Suspects are sent to the next engine in
groups, each when the one before made progress; a death then points at one group, and within it at one request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .journal import Entry


def suspects(entries: Iterable[Entry], max_deaths: int) -> list[Entry]:
    """Those of ``entries`` that saw ``max_deaths`` deaths or more."""
    return [entry for entry in entries if entry.deaths >= max_deaths]


def trial_groups(suspected: list[Entry], max_deaths: int) -> list[list[Entry]]:
    """Split suspects into the groups in which they are tried, in the order to try them.

    Those that died in a trial before come first and alone. All others come in groups of the square root of their
    number: of N suspects the one that kills is found by two further deaths, and none waits for more than about that
    many groups. The children of one request stay together.
    """
    tried = _requests(entry for entry in suspected if entry.deaths > max_deaths)
    others = _requests(entry for entry in suspected if entry.deaths == max_deaths)
    size = max(1, math.isqrt(len(others)))
    groups = [others[first : first + size] for first in range(0, len(others), size)]
    return tried + [[entry for request in group for entry in request] for group in groups]


def culprits(stuck: list[Entry], max_deaths: int) -> list[Entry]:
    """The entries that killed an engine for certain.

    Args:
        stuck: those that made no progress since they were sent to the engine that died.
        max_deaths: deaths from which a request is suspected.
    """
    alone = len({entry.shown_id for entry in stuck}) == 1
    return suspects(stuck, max_deaths) if alone else []


def _requests(entries: Iterable[Entry]) -> list[list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.shown_id, []).append(entry)
    return list(found.values())
