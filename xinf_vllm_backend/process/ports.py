"""Where a process begins to look for free ports, so that no two find the same one before they listen on it."""

from __future__ import annotations

import itertools
import random
import threading

# Below the ports that Linux gives to connections by itself (from 32768 on), above those of well-known services.
FIRST, LAST = 12_000, 32_000
SPAN = 50  # ports for each process

_slots = itertools.cycle(range(FIRST, LAST, SPAN))
_lock = threading.Lock()


def _start_anywhere() -> None:
    for _ in range(random.randrange((LAST - FIRST) // SPAN)):
        next(_slots)


_start_anywhere()  # other processes count for themselves


def first() -> int:
    """The first port for the next process; no other of this process's children gets one within 50 of it."""
    with _lock:
        return next(_slots)
