"""Removes what killed processes leave behind: files, and names in shared memory.

Everything that an engine makes has one mark in its name. The janitor, a shell of a few hundred KiB, waits until the
last process of the engine has ended, and removes everything with that mark.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import secrets
import subprocess
import tempfile
from multiprocessing import Pipe, resource_tracker, shared_memory
from multiprocessing.connection import Connection
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
LONGEST_BASE = 50  # characters: the name of a socket has at most 107, of which the mark and a UUID take 52
# Signals that stop a whole service reach the janitor too; it ends after the engine.
_JANITOR = 'trap "" TERM INT HUP; read -r _; rm -rf -- "$1" "$2"/*"$3"*'


class Cleanup:
    """The files and names of one engine, removed when the last process that holds :attr:`alive` has ended.

    Args:
        base: the directory is made in it, in /tmp if its name is too long; by default the system's for such files.

    Attributes:
        mark: part of the names of all that is to be removed; "" if there is no janitor.
        directory: for files; made here, and removed.
        alive: to be held open by every process of the engine until it ends.
    """

    def __init__(self, base: str | None = None) -> None:
        self.mark = f"xvllm{secrets.token_hex(4)}"
        base = base or tempfile.gettempdir()
        self.directory = Path(base if len(base) <= LONGEST_BASE else "/tmp") / self.mark
        until_end, self.alive = Pipe(duplex=False)
        with until_end:
            self._janitor = _janitor(self.directory, SHARED_MEMORY, self.mark, until_end)
        if self._janitor is None:
            self.mark = ""
        self.directory.mkdir(mode=0o700)  # after the janitor, which removes it

    def remove(self, timeout: float) -> None:
        """Close :attr:`alive`, and wait up to ``timeout`` seconds until all is removed; idempotent."""
        self.alive.close()
        if self._janitor is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._janitor.wait(timeout)


class AtEnd:
    """Has ``directory`` removed when this process has ended, however it does.

    Args:
        directory: which is there.
    """

    def __init__(self, directory: Path) -> None:
        until_end, self._alive = Pipe(duplex=False)
        with until_end:
            self._janitor = _janitor(directory, directory, "*", until_end)

    def now(self, timeout: float) -> None:
        """Have it removed now, and wait up to ``timeout`` seconds; idempotent."""
        self._alive.close()
        if self._janitor is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._janitor.wait(timeout)


def name_after(mark: str) -> None:
    """Put ``mark`` into the names of shared memory and semaphores that this process and its children make."""
    # Private names of multiprocessing: without them there is no mark, and nothing else changes.
    names: dict[str, object] = vars(shared_memory)
    names["_SHM_NAME_PREFIX"] = f"/{mark}-"
    names["_SHM_SAFE_NAME_LENGTH"] = len(mark) + 10
    multiprocessing.current_process()._config["semprefix"] = f"/{mark}"  # type: ignore[attr-defined]
    # The resource tracker outlives the engine, and would warn about what the janitor removed.
    vars(resource_tracker).update(register=_leave_to_janitor, unregister=_leave_to_janitor)


def _leave_to_janitor(name: str, rtype: str) -> None:
    pass


def _janitor(directory: Path, others: str | Path, mark: str, until_end: Connection) -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "xinf-vllm-janitor", directory, others, mark],
            stdin=until_end.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=os.sep,
            start_new_session=True,  # not ended by Ctrl-C
        )
    except OSError as error:
        logger.warning("Files of killed engines will stay in %s and %s: %s", directory, others, error)
        return None
