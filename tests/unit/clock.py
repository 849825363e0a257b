"""A clock that goes when a test says so."""

from __future__ import annotations


class Clock:
    """Seconds, as ``time.monotonic`` counts them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
