"""Where a process looks for free ports, so that no two find the same one before they listen on it."""

from __future__ import annotations

import contextlib
import random
import socket

# Below the ports that Linux gives to connections by itself (from 32768 on), above those of well-known services.
FIRST, LAST = 12_000, 32_000
SPAN = 50  # ports for each process; who has bound the first has all

_taken: list[socket.socket] = []  # until this process ends, however it does


def take() -> int | None:
    """Take a range of ports, which no other process of this host gets while this one lives.

    Returns:
        the first port of the ``SPAN - 1`` to use; None if all ranges are taken.
    """
    # Of the system's, since a process that was forked has the random state of others.
    for first in random.SystemRandom().sample(range(FIRST, LAST, SPAN), k=(LAST - FIRST) // SPAN):
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket())
            try:
                bound.bind(("127.0.0.1", first))
            except OSError:  # another has it
                continue
            stack.pop_all()
        _taken.append(bound)
        return first + 1
    return None
