"""Which requests are sent to an engine that pauses or sleeps: all, those that were there before, or none.

The gate is here and not in vLLM, which queues what arrives while it is paused up to 0.32 and refuses it from 0.33 on.
"""

from __future__ import annotations

from enum import Enum

from ..errors import EnginePausedError
from .journal import Entry


class Lets(Enum):
    """Which requests are sent."""

    ALL = "all"
    BEGUN = "begun"  # those that were there when it closed
    NONE = "none"


class Admission:
    """The gate of one engine.

    Args:
        name: of the engine, in errors.

    Attributes:
        lets: which requests are sent, while the engine does not sleep.
        asleep: whether it sleeps; then none is.
        hold: seconds that a request which arrives meanwhile waits; 0: it is refused at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.lets = Lets.ALL
        self.asleep = False
        self.hold = 0.0

    @property
    def is_open(self) -> bool:
        return self.lets is Lets.ALL

    def close(self, hold: float) -> None:
        """Let no further request in."""
        self.hold = hold
        if self.is_open:
            self.lets = Lets.BEGUN

    def admits(self, entry: Entry) -> bool:
        """Whether ``entry`` is sent once the engine is awake."""
        return self.is_open or (self.lets is Lets.BEGUN and not entry.held)

    def check(self) -> None:
        """Refuse a request that is not to wait, before AsyncLLM knows of it.

        Raises:
            EnginePausedError: it is closed, and nothing is held.
        """
        if not (self.is_open or self.hold):
            raise EnginePausedError(f"The model {self._name} is paused; send the request again later.")

    def overdue(self) -> EnginePausedError:
        """What a request is told that was held for as long as one may be."""
        return EnginePausedError(
            f"The model {self._name} is paused, and the request has waited for {self.hold:g} s; send it again later."
        )
