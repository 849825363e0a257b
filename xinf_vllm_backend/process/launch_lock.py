"""Launches wait for one another: in one process for the launch lock, between processes for the locks of devices.

A launch takes its devices first and then the launch lock. It must not wait for a device while it holds the launch lock:
the launch that has the device may be waiting for that.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import psutil
from filelock import FileLock, Timeout

from ..errors import EngineStartError, EngineStartTimeoutError, EngineStoppedError
from . import lock_directory

POLL = 0.1  # seconds until a waiter sees that it was cancelled, or that a device was released
NO_TRAPS = os.O_NOFOLLOW | os.O_NONBLOCK  # where anybody may write, there may be a link or a pipe without a reader


class LaunchLock:
    """Serialises what launches share: configuration, ports and spawning. It ends before the handshake."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Hold] = deque()  # the first one has the lock

    def hold(self, who: str, timeout: float, cancelled: threading.Event) -> Hold:
        """Take the lock for the engine ``who``, waiting up to ``timeout`` seconds or until ``cancelled`` is set.

        First come, first served.

        Raises:
            EngineStartTimeoutError: another launch had the lock all the time.
            EngineStoppedError: ``cancelled`` was set.
        """
        deadline = time.monotonic() + timeout
        hold = Hold(self, who)
        with self._changed:
            self._queue.append(hold)
            try:
                while (holder := self._queue[0]) is not hold and not cancelled.is_set():
                    if (left := deadline - time.monotonic()) <= 0:
                        raise EngineStartTimeoutError(
                            f"The launch of {who} waited {timeout:g} s for its turn, which {holder.who} has had for "
                            f"{time.monotonic() - holder.since:.0f} s: stop that launch or allow this one more time."
                        )
                    self._changed.wait(min(left, POLL))
                if cancelled.is_set():
                    raise EngineStoppedError(f"The launch of {who} was stopped before it had its turn.")
            except BaseException:
                hold.release()
                raise
            hold.since = time.monotonic()
        return hold

    def leave(self, hold: Hold) -> None:
        """Take ``hold`` out of the queue, if it is still there."""
        with self._changed:
            if hold in self._queue:
                self._queue.remove(hold)
                self._changed.notify_all()


class Hold(AbstractContextManager["Hold"]):
    """A place in the queue of a launch lock, until it is released."""

    def __init__(self, lock: LaunchLock, who: str) -> None:
        self._lock = lock
        self.who = who
        self.since = time.monotonic()

    def release(self) -> None:
        """Let the next launch in; may be called by any thread and more than once."""
        self._lock.leave(self)

    def __exit__(self, *exc_info: object) -> None:
        self.release()


# One for all engines of the process, which share its ports and its environment.
launch_lock = LaunchLock()


class DeviceLocks(AbstractContextManager["DeviceLocks"]):
    """Keeps engines of all processes, this one included, from starting on one device at the same time.

    They are taken before the launch lock and held until the engine is ready. The kernel frees those of a dead process.

    Args:
        devices: names of physical devices; a device must have the same name in every process.
        who: name of the engine, for messages.
        directory: where the lock files are, the same in every process; by default one that all users share (see
            :func:`.lock_directory.default`).
    """

    def __init__(self, devices: Iterable[str], who: str, directory: Path | None = None) -> None:
        self.devices = sorted(set(devices))
        self.who = who
        self._directory = directory
        self._held = ExitStack()
        self._releasing = threading.Lock()

    def acquire(self, timeout: float, cancelled: threading.Event) -> None:
        """Take all devices or none, waiting up to ``timeout`` seconds in all or until ``cancelled`` is set.

        Raises:
            EngineStartTimeoutError: another launch had one of the devices.
            EngineStoppedError: ``cancelled`` was set.
            EngineStartError: the lock files cannot be used.
        """
        if not self.devices:
            return
        deadline = time.monotonic() + timeout
        with ExitStack() as taken:
            try:
                directory = self._prepared()
                for device in self.devices:  # in the same order everywhere, so that no two wait for each other
                    lock = _DeviceLock(directory, device)
                    taken.callback(lock.let_go)
                    while not cancelled.is_set() and not lock.try_take(self.who):
                        if (left := deadline - time.monotonic()) <= 0:
                            raise EngineStartTimeoutError(
                                f"The launch of {self.who} waited {timeout:g} s for device {device}, held by "
                                f"{lock.holder()} until its engine is ready: wait for that, stop it or allow more time."
                            )
                        cancelled.wait(min(left, POLL))
                    if cancelled.is_set():
                        raise EngineStoppedError(f"The launch of {self.who} was stopped before it had its devices.")
            except (OSError, NotImplementedError) as error:
                where = self._directory or lock_directory.shared()
                raise EngineStartError(
                    f"The launch of {self.who} cannot lock its devices by files in {where} ({error}): "
                    "make that a directory in which this user may write, or remove it."
                ) from error
            self._held = taken.pop_all()

    def _prepared(self) -> Path:
        return lock_directory.default() if self._directory is None else lock_directory.prepare(self._directory)

    def release(self) -> None:
        """Let go of all devices; may be called by any thread and more than once. It does not end an acquire()."""
        with self._releasing:
            self._held.close()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class _DeviceLock:
    """One device: a file that is locked, and another one that names the holder.

    Two files, as in some versions of filelock even one that only tries the lock empties its file.
    """

    def __init__(self, directory: Path, device: str) -> None:
        self._path = directory / f"device-{quote(device, safe='')}.lock"
        self._note = self._path.with_suffix(".holder")
        self._file = FileLock(self._path, mode=0o666, thread_local=False)  # it is another thread that sees READY

    def try_take(self, who: str) -> bool:
        try:
            self._file.acquire(blocking=False)
        except Timeout:
            return False
        me = psutil.Process()
        since = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
        self._write({"who": who, "pid": me.pid, "created": me.create_time(), "since": since})
        return True

    def let_go(self) -> None:
        if self._file.is_locked:
            self._write(None)  # while it is ours: the next holder comes a moment before its note
            self._file.release()

    def holder(self) -> str:
        """Who holds the device since when, or that this is not known; a note by a dead process says nothing of it."""
        with suppress(OSError, ValueError, TypeError, KeyError, psutil.Error):
            with open(os.open(self._note, os.O_RDONLY | NO_TRAPS)) as file:
                note = json.load(file)
            process = psutil.Process(note["pid"])
            # Not just equal: psutil counts from the time of boot, which moves when the clock is set.
            is_same = abs(process.create_time() - note["created"]) < 1
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                return f"{note['who']} (pid {note['pid']}, since {note['since']})"
        return f"an unknown engine (`fuser {self._path}` may show its process)"

    def _write(self, content: dict[str, object] | None) -> None:
        with suppress(OSError):  # the lock is what counts
            try:
                note = os.open(self._note, os.O_WRONLY | os.O_TRUNC | NO_TRAPS)
            except FileNotFoundError:
                note = os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.fchmod(note, 0o666)  # a mode given to open would heed the umask
            with open(note, "w") as file:
                json.dump(content, file)
