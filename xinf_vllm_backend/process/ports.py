"""Where a process begins to look for free ports, so that no two find the same one before they listen on it."""

from __future__ import annotations

import itertools
import random
import threading

# Below the ports that Linux gives to connections by itself (from 32768 on), above those of well-known services.
FIRST, LAST = 12_000, 32_000
SPAN = 50  # ports for each process

_COUNT = (LAST - FIRST) // SPAN
_numbers = itertools.count(random.randrange(_COUNT))  # random: other processes count for themselves
_lock = threading.Lock()


def first() -> int:
    """The first port for the next child; no other child of this process gets one within 50 of it."""
    with _lock:
        return FIRST + next(_numbers) % _COUNT * SPAN
