"""Linux's prctl(2): who becomes the parent of orphans, and who dies with its parent.

Neither is there on another system; what needs them says so and does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_PDEATHSIG = 1
_CHILD_SUBREAPER, _IS_CHILD_SUBREAPER = 36, 37

_TICK = 0.1  # seconds; the kernel counts starts in hundredths

_lock = threading.Lock()
_adopting = 0
_always = False  # somebody else has this process adopt orphans
_own: frozenset[int] = frozenset()  # the children before it adopted any
_since = 0.0  # when that was, in seconds since the system started


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Become the parent of each descendant whose own parent ends before the block does; any number of threads at once.

    Those that ran before the block are nobody's to wait for, so each is reaped when it ends.

    Raises:
        OSError: the system has nothing like it.
    """
    global _adopting, _always, _own, _since
    with _lock:
        if not _adopting:
            _always = _is_adopting()
            _own, _since = _children(), time.clock_gettime(time.CLOCK_BOOTTIME) - _TICK
            _prctl(_CHILD_SUBREAPER, 1)
        _adopting += 1
    try:
        yield
    finally:
        with _lock:
            _adopting -= 1
            if not _adopting and not _always:
                _prctl(_CHILD_SUBREAPER, 0)
                _reap_others()


def _children() -> frozenset[int]:
    return frozenset(child.pid for child in psutil.Process().children())


def _reap_others() -> None:
    for pid in _children() - _own:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another thread has reaped its own child
            if _started(pid) < _since:
                threading.Thread(target=_reap, args=(pid,), name="reap-orphan", daemon=True).start()


def _started(pid: int) -> float:
    """When the child ``pid``, which may have ended, started; in seconds since the system did."""
    # psutil's create_time() adds the time of the system's start, which the kernel rounds to a second.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the process ``parent``, its parent, ends.

    Raises:
        OSError: it is not our parent, or the system has nothing like it.
    """
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError(f"its parent is the process {os.getppid()} and not {parent}")


def _is_adopting() -> bool:
    found = ctypes.c_int()
    _prctl(_IS_CHILD_SUBREAPER, ctypes.addressof(found))
    return bool(found)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        raise OSError("this system has no prctl")
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
