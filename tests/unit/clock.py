"""Time that passes when a test says so."""

from __future__ import annotations


class Clock:
    """A clock that stands still.

    Attributes:
        now: seconds; what calling it returns.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
