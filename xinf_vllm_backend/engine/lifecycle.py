"""The states of an engine and who may move it between them.

This module owns the state and its history and nothing else: it starts, watches and stops nothing. FAILED and STOPPED
are final; make a new engine after that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .death import Death

logger = logging.getLogger(__name__)

HISTORY = 100  # moves that are remembered


class State(str, Enum):
    """What an engine is doing."""

    NEW = "new"  # made, and nothing begun
    STARTING = "starting"  # its first processes are being started
    READY = "ready"  # it serves
    RESTARTING = "restarting"  # its processes are gone or going, others are coming; requests wait
    ASLEEP = "asleep"  # it holds no memory of its devices; requests wait
    WAKING = "waking"  # it is to serve again
    STALE = "stale"  # restarted without the weights it had been given since its launch; it does not serve
    STOPPING = "stopping"  # asked to end
    STOPPED = "stopped"  # ended because it was asked to
    FAILED = "failed"  # it could not be started, or not again


_ENDING = frozenset({State.STOPPING, State.FAILED})
_NEXT: dict[State, frozenset[State]] = {
    State.NEW: _ENDING | {State.STARTING},
    State.STARTING: _ENDING | {State.READY},
    State.READY: _ENDING | {State.RESTARTING, State.ASLEEP},
    State.RESTARTING: _ENDING | {State.READY, State.STALE},
    State.ASLEEP: _ENDING | {State.WAKING},
    State.WAKING: _ENDING | {State.READY, State.STALE, State.RESTARTING},
    State.STALE: _ENDING | {State.READY, State.RESTARTING},
    State.STOPPING: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset({State.STOPPING}),
}


@dataclass(frozen=True)
class Move:
    """A change of state.

    Attributes:
        state: that was moved to.
        reason: a sentence.
        at: seconds, by the clock of the lifecycle.
        previous: the state before.
        death: of the engine, for a move that it caused.
    """

    state: State
    reason: str
    at: float
    previous: State
    death: Death | None = None


class Lifecycle:
    """The state of one engine.

    Args:
        name: of the engine, in the log.
        on_move: called with each move, after it was made, on the thread that made it; what it raises is logged.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        on_move: Callable[[Move], None] = lambda move: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._on_move = on_move
        self._clock = clock
        self._lock = threading.Lock()
        self.state = State.NEW
        self.history: deque[Move] = deque(maxlen=HISTORY)

    def move(self, state: State, reason: str, death: Death | None = None) -> bool:
        """Go to ``state``, unless there is no way from here, and log it with its ``reason``.

        Returns:
            Whether it was moved; False where another move came first, such as a stop during a restart.
        """
        with self._lock:
            if state not in _NEXT[self.state]:
                return False
            move = Move(state, reason, self._clock(), self.state, death)
            self.state = state
            self.history.append(move)
        log = logger.error if state in (State.RESTARTING, State.FAILED, State.STALE) else logger.info
        log("The vLLM engine of %s is %s: %s", self._name, state.value, reason)
        try:
            self._on_move(move)
        except Exception:  # a listener must not cost the engine
            logger.exception("A change of state of %s could not be told", self._name)
        return True
