"""The checksum of a checkpoint: of all that its files hold, and not of their names and headers.

Each file is read once. Its checksum is kept on disk as long as the file is the same to the file system, so that no
later launch reads it for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("xinference.vllm_backend")

THREADS = 4  # files that are read at the same time
CHUNK = 4 << 20  # bytes that are read at once
UNSETTLED = 2.0  # seconds after a change in which the next may leave the file the same to the file system

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", "config.json")

Identity = tuple[int, ...]


class CheckpointChangedError(OSError):
    """A file of the checkpoint was changed while it was read; takes one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was when it was loaded; plain data.

    Attributes:
        directory: where it was.
        files: what each file was to the file system.
        checksum: of what they held; None if that is not known.
    """

    directory: str
    files: dict[str, Identity]
    checksum: str | None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Checkpoint:
        """The one with these attributes, as ``asdict`` or JSON has them."""
        files = {name: tuple(identity) for name, identity in fields["files"].items()}
        return cls(str(fields["directory"]), files, fields["checksum"])

    def is_there(self, stop: threading.Event) -> bool:
        """Whether the directory holds the same now; reads what is no longer the same to the file system.

        Args:
            stop: set to have it end soon, with False.
        """
        try:
            if files(self.directory) == self.files:
                return True
            return self.checksum is not None and checksum(self.directory, stop) == self.checksum
        except OSError as error:
            logger.warning("Whether %s holds the same checkpoint cannot be found out: %s", self.directory, error)
            return False


class Reading:
    """Reads a checkpoint on a thread of its own, from now on.

    Args:
        directory: of the checkpoint.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._stop = threading.Event()
        self._checksum: str | None = None
        self._files: dict[str, Identity] = {}
        with contextlib.suppress(OSError):  # the one who loads it meets that, too
            self._files = files(directory)
        self._thread = threading.Thread(target=self._read, name="xinf-vllm-checksum", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._checksum = checksum(self._directory, self._stop)
        except (OSError, ImportError) as error:  # the second where the process is ending
            logger.warning("The checksum of %s is not known: %s", self._directory, error)

    def result(self, timeout: float) -> Checkpoint:
        """The checkpoint, which has been loaded meanwhile; waits up to ``timeout`` seconds for its checksum."""
        self._thread.join(timeout)
        known = self._checksum
        self.stop()
        with contextlib.suppress(OSError):
            if files(self._directory) == self._files:
                return Checkpoint(self._directory, self._files, known)
        logger.warning("The checkpoint %s was changed while it was loaded", self._directory)
        return Checkpoint(self._directory, {}, None)

    def stop(self) -> None:
        """Read no further."""
        self._stop.set()


def files(directory: str) -> dict[str, Identity]:
    """What each file of the checkpoint is to the file system: device, inode, size, and times of the last changes.

    Raises:
        OSError: the directory cannot be read.
    """
    names = sorted(name for name in os.listdir(directory) if name.endswith(_ENDINGS))
    return {name: _identity(os.path.join(directory, name)) for name in names}


def checksum(directory: str, stop: threading.Event) -> str:
    """The checksum of the checkpoint in ``directory``; blocks for as long as its unknown files take to be read.

    Args:
        stop: set to have it end soon.

    Raises:
        OSError: a file cannot be read, was changed meanwhile, or it was stopped.
    """
    found = files(directory)
    known = _known(directory)
    names = [name for name in found if known.get(name, ((), ""))[0] != found[name]]
    if names:
        with ThreadPoolExecutor(THREADS, "xinf-vllm-checksum") as pool:
            sums = pool.map(lambda name: _checksum(Path(directory, name), found[name], stop), names)
            known.update({name: (found[name], checked) for name, checked in zip(names, sums, strict=True)})
        _keep(directory, {name: known[name] for name in found})
    together = [(name, known[name][1]) for name in found]
    return hashlib.sha256(repr(together).encode()).hexdigest()


def _checksum(path: Path, identity: Identity, stop: threading.Event) -> str:
    checked, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(chunk):
            checked.update(chunk[:length])
            if stop.is_set():
                raise InterruptedError("it was no longer waited for")
    if _identity(str(path)) != identity:
        raise CheckpointChangedError(f"{path} was changed while it was read")
    return checked.hexdigest()


def _identity(path: str) -> Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _kept(directory: str) -> Path:
    from xinference.constants import XINFERENCE_HOME

    name = hashlib.sha256(os.path.abspath(directory).encode()).hexdigest()[:32]
    return Path(XINFERENCE_HOME, "vllm_backend", "checksums", f"{name}.json")


def _known(directory: str) -> dict[str, tuple[Identity, str]]:
    """Of each file, what it was to the file system when it was read, and its checksum."""
    try:
        kept = json.loads(_kept(directory).read_text())
        return {name: (tuple(identity), str(checked)) for name, (identity, checked) in kept.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("The checksums of %s are made again: %r", directory, error)
        return {}


def _keep(directory: str, known: Mapping[str, tuple[Identity, str]]) -> None:
    now = time.time()
    settled = {name: one for name, one in known.items() if now - one[0][-1] / 1e9 > UNSETTLED}
    path = _kept(directory)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(settled))
        temporary.replace(path)
    except OSError as error:  # they are made again
        logger.warning("The checksums of %s could not be kept: %s", directory, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
