"""Forks a child that is checked before anything runs in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe

CHECK_TIMEOUT = 10.0  # seconds; only a child that is stopped needs more than a few milliseconds


def fork(hazard: Callable[[], str | None]) -> int:
    """Fork as :func:`os.fork` does, a child that goes on only if ``hazard`` names nothing in it.

    Waits for that, up to 10 s, and kills a child that does not go on; the caller has to reap it.

    Raises:
        OSError: there is no child that goes on; the message says why.
    """
    near, far = Pipe(duplex=False)
    with near, far:
        pid = os.fork()
        if pid == 0:
            _go_on_or_end(hazard, far)
            return 0
        far.close()
        reason = _heard(near)
        if reason:
            os.kill(pid, signal.SIGKILL)  # a zombie at most, and nobody has reaped it
            raise OSError(reason)
        return pid


def _go_on_or_end(hazard: Callable[[], str | None], far: Connection) -> None:
    is_clean = False
    try:
        reason = hazard()
        far.send_bytes((reason or "").encode())
        is_clean = reason is None
    finally:
        if not is_clean:
            os._exit(1)


def _heard(near: Connection) -> str:
    """Why the child does not go on; "" if it does."""
    try:
        if near.poll(CHECK_TIMEOUT):
            return near.recv_bytes().decode()
        return f"its child could not be checked within {CHECK_TIMEOUT:g} s"
    except EOFError:
        return "its child ended before it was checked"
