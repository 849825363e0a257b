"""How often an engine may be restarted, and how soon after it died."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FIRST_DELAY = 0.5  # seconds before the second restart in a row; the first one is not delayed
LONGEST_DELAY = 30.0  # seconds
JITTER = 0.25  # of the delay, up or down, so that engines that died together do not start together


class RestartBudget:
    """A bucket of restarts, refilled while the engine is healthy.

    Args:
        size: restarts that can be had at once.
        refill: seconds of health that give one back.
        clock: seconds.
        draw: a number from 0 to 1.
    """

    def __init__(
        self,
        size: int,
        refill: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._size = size
        self._refill = refill
        self._clock = clock
        self._draw = draw
        self._in_row = 0
        self._healthy_since: float | None = None
        self.left = float(size)

    def healthy(self) -> None:
        """The engine serves from now on."""
        self._healthy_since = self._clock()

    def take(self) -> float | None:
        """Take one restart out.

        Returns:
            Seconds to wait before it; None where none is left.
        """
        if self._healthy_since is not None:
            gained = (self._clock() - self._healthy_since) / self._refill
            self._healthy_since = None
            self.left = min(self._size, self.left + gained)
            self._in_row = 0 if gained >= 1 else self._in_row
        if self.left < 1:
            return None
        self.left -= 1
        self._in_row += 1
        if self._in_row == 1:
            return 0.0
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(self._in_row - 2, 16))
        return delay * (1 + JITTER * (2 * self._draw() - 1))
