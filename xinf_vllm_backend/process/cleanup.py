"""Removes what processes leave behind when they are killed: files, and names in shared memory.

All that belongs to one engine has one mark in its name. A process of a few hundred KiB, the janitor, waits until the
last process of the engine has ended, in whatever way, and removes what bears the mark.
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
# Whoever stops a whole service tells each of its processes to go; this one goes when the others have.
_JANITOR = 'trap "" TERM INT HUP; read -r _; rm -rf -- "$1" "$2"/*"$3"*'


class Cleanup:
    """The files and names of one engine, removed when the last process that holds :attr:`alive` has ended.

    Args:
        base: the directory is made in it, in /tmp if its name is too long; by default the system's for such files.

    Attributes:
        mark: in the name of all that is to be removed; "" where nobody will.
        directory: for files; made and removed by us.
        alive: every process of the engine is to hold it until it ends.
    """

    def __init__(self, base: str | None = None) -> None:
        self.mark = f"xvllm{secrets.token_hex(4)}"
        base = base or tempfile.gettempdir()
        self.directory = Path(base if len(base) <= LONGEST_BASE else "/tmp") / self.mark
        until_end, self.alive = Pipe(duplex=False)
        with until_end:
            self._janitor = _janitor(self.directory, self.mark, until_end)
        if self._janitor is None:
            self.mark = ""
        self.directory.mkdir(mode=0o700)  # now that somebody will remove it

    def remove(self, timeout: float) -> None:
        """Let go, and wait up to ``timeout`` seconds until all is removed; idempotent."""
        self.alive.close()
        if self._janitor is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._janitor.wait(timeout)


def name_after(mark: str) -> None:
    """Let what this process makes in shared memory, and whoever it starts, bear ``mark``."""
    # Names that multiprocessing keeps to itself: should they go, so does the mark, and nothing else.
    names: dict[str, object] = vars(shared_memory)
    names["_SHM_NAME_PREFIX"] = f"/{mark}-"
    names["_SHM_SAFE_NAME_LENGTH"] = len(mark) + 10
    multiprocessing.current_process()._config["semprefix"] = f"/{mark}"  # type: ignore[attr-defined]
    # Else the tracker, which lives as long as the process that owns the engine, would miss what the janitor removed.
    vars(resource_tracker).update(register=_leave_to_janitor, unregister=_leave_to_janitor)


def _leave_to_janitor(name: str, rtype: str) -> None:
    pass


def _janitor(directory: Path, mark: str, until_end: Connection) -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "xinf-vllm-janitor", directory, SHARED_MEMORY, mark],
            stdin=until_end.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=os.sep,
            start_new_session=True,  # Ctrl-C is not for it
        )
    except OSError as error:
        logger.warning("Files of killed engines will stay in %s and %s: %s", directory, SHARED_MEMORY, error)
        return None
