"""Linux's prctl(2): who becomes the parent of orphans, and who dies with its parent.

Neither is there on another system; what needs them says so and does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator

_PDEATHSIG = 1
_CHILD_SUBREAPER, _IS_CHILD_SUBREAPER = 36, 37

_lock = threading.Lock()
_adopting = 0
_always = False  # somebody else has this process adopt orphans


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Become the parent of each descendant whose own parent ends before the block does; any number of threads at once.

    Raises:
        OSError: the system has nothing like it.
    """
    global _adopting, _always
    with _lock:
        if not _adopting:
            _always = _is_adopting()
            _prctl(_CHILD_SUBREAPER, 1)
        _adopting += 1
    try:
        yield
    finally:
        with _lock:
            _adopting -= 1
            if not _adopting and not _always:
                _prctl(_CHILD_SUBREAPER, 0)


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
