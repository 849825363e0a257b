"""When is an engine hung: it gives no sign of life, and none of work, for ``hang_timeout`` seconds.

A sign of life is any output and any answer to a heartbeat. An engine answers between two steps; a step may be long (a
large prefill, a first compilation), so Workers that compute count as a sign too, up to ``busy_factor`` times as long.
This module counts; it asks nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

BUSY = 0.05  # share of one core; a process that waits for another one of the engine was seen to use up to 0.015
SLACK = 2.0  # looks; any gap beyond this many intervals is our own delay, not silence


class HangClock:
    """For how long an engine has been silent, as seen by looking at it about every ``interval`` seconds.

    Time in which nobody looked does not count: this process may have been held up, or the whole machine.

    Args:
        hang_timeout: seconds of silence that make a hang.
        busy_factor: number of hang_timeouts for which computing alone counts as work: an endless loop computes too.
        interval: seconds between two looks.
        clock: seconds.

    Attributes:
        limit: seconds of silence that made a hang at the last look.
    """

    def __init__(
        self,
        hang_timeout: float,
        busy_factor: float,
        interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hang_timeout = hang_timeout
        self._busy_factor = busy_factor
        self._longest_look = SLACK * interval
        self._clock = clock
        self.limit = hang_timeout
        self.heard()

    def heard(self) -> None:
        """The engine gave a sign of life."""
        self._looked = self._clock()
        self.silent = self.unanswered = 0.0  # seconds without any sign, and without one but work

    def look(self, works: bool, patience: float = 0.0) -> bool:
        """Count the time since the last look.

        Args:
            works: whether the engine was seen computing since.
            patience: seconds of silence that make a hang now, where that is more than ``hang_timeout``.

        Returns:
            Whether the engine is hung.
        """
        now = self._clock()
        passed = min(now - self._looked, self._longest_look)
        self._looked = now
        self.unanswered += passed
        self.limit = max(self._hang_timeout, patience)
        counts = works and self.unanswered < self._busy_factor * self._hang_timeout
        self.silent = 0.0 if counts else self.silent + passed
        return self.silent >= self.limit


class Workload:
    """Whether an engine computes, from the seconds of CPU that its processes have used.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._then = clock()
        self._before: Mapping[int, float] = {}

    def works(self, workers: Mapping[int, float], others: Mapping[int, float]) -> bool:
        """Whether every Worker, or any other process of the engine, has computed since the last call.

        Of several Workers the one that hangs is idle, and the others may spin while they wait for it.

        Args:
            workers: seconds of CPU used so far, by pid.
            others: the same, of EngineCore above all.
        """
        now = self._clock()
        least = BUSY * (now - self._then)
        busy = {
            pid for pid, seconds in {**workers, **others}.items() if seconds - self._before.get(pid, seconds) > least
        }
        self._then, self._before = now, {**workers, **others}
        return not busy.isdisjoint(others) or (bool(workers) and busy.issuperset(workers))
