"""The directory of the lock files of devices: one for all users, in which none can replace what another one made."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED, PRIVATE = 0o1777, 0o700  # modes


def shared() -> Path:
    """Where all users' locks are by default."""
    return Path(tempfile.gettempdir()) / "xinf-vllm-locks"


def default() -> Path:
    """The shared directory, or where that is not safe, with a warning, one of this user's own.

    Raises:
        OSError: neither can be used.
    """
    try:
        return prepare(shared())
    except OSError as error:
        own = shared().with_name(f"{shared().name}-{os.geteuid()}")
        logger.warning(
            "Devices are locked in %s, where engines of other users do not look (%s): have root make %s, mode 1777.",
            own,
            error,
            shared(),
        )
        return prepare(own, PRIVATE)


def prepare(directory: Path, mode: int = SHARED) -> Path:
    """Make ``directory`` where it is missing, and return it.

    Raises:
        OSError: it cannot be made, or another user could replace what is in it.
    """
    with suppress(FileExistsError):
        directory.mkdir(parents=True)
        directory.chmod(mode)  # mkdir would heed the umask
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"it belongs to another user, uid {status.st_uid}", str(directory))
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "other users may write to it, and it has no sticky bit", str(directory))
    return directory
