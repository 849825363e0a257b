"""How an engine process comes into being: spawned, or forked by the zygote.

Both run multiprocessing's own child side, with the environment they are given in place of the parent's.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from multiprocessing import popen_fork, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import get_spawning_popen, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .zygote.client import ZygoteClient

STATUS_TIMEOUT = 5.0  # seconds that the zygote has to tell how a child of it ended, once it has
ASIDE_TIMEOUT = 0.1  # seconds of that for one who only wants to look
STATUS_UNKNOWN = 255  # exit code of a process whose zygote died before it


class _EnginePopen(popen_fork.Popen):
    """What both have in common: two pipes, by which each side sees the other end."""

    def __init__(self, process: BaseProcess, environment: Mapping[str, str]) -> None:
        self._fds: list[int] = []
        self._environment = environment
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        with contextlib.ExitStack() as stack:
            child_r, parent_w = _pipe(stack)
            self.sentinel, self.alive = _pipe(stack)
            data = self._pickled(process)
            self.pid = self._make(child_r, self.alive)
            os.close(child_r)  # before we write: into a pipe without a reader one does not write for ever
            os.close(self.alive)
            stack.pop_all()
            # One that has ended already is told of by its exit code and its output.
            with contextlib.suppress(BrokenPipeError), open(parent_w, "wb", buffering=0, closefd=False) as child:
                while data:
                    data = data[child.write(data) :]
        # The child sees that we are gone when the last copy of parent_w is closed, and only we have it.
        self.finalizer = util.Finalize(self, _close_both, (self.sentinel, parent_w))

    def _pickled(self, process: BaseProcess) -> memoryview:
        buffer = io.BytesIO()
        set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(spawn.get_preparation_data(process.name), buffer)
            reduction.dump(process, buffer)
        finally:
            set_spawning_popen(None)
        return buffer.getbuffer()

    def _make(self, data: int, alive: int) -> int:
        """Make the process, give it both ends and ``_fds``; returns its pid."""
        raise NotImplementedError


class Alive:
    """Arrives in a spawned process as the file descriptor that tells its end; what it forks must not hold that."""

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (get_spawning_popen().alive,)  # type: ignore[union-attr]


class SpawnPopen(_EnginePopen):
    """A fresh interpreter, with ``environment`` from its first instruction."""

    method = "spawn"
    DupFd = popen_spawn_posix.Popen.DupFd

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _make(self, data: int, alive: int) -> int:
        tracker = resource_tracker.getfd()
        assert tracker is not None
        command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=data)
        command[0] = os.fsdecode(spawn.get_executable())
        self._process = subprocess.Popen(
            command, env=dict(self._environment), pass_fds={tracker, data, alive, *self._fds}
        )
        return self._process.pid

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        # Unlike a bare waitpid() this loses no exit code when two threads ask.
        self.returncode = self._process.poll() if flag == os.WNOHANG else self._process.wait()
        return self.returncode


class _Inherited:
    """Pickled in the place of a file descriptor: which one it is among those sent to the zygote."""

    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        return inherited[self.index]


inherited: list[int] = []  # the file descriptors that a child of the zygote was sent


class ZygotePopen(_EnginePopen):
    """A child of the zygote.

    Raises:
        ZygoteUnavailableError: there is no child, and none will come.
    """

    method = "spawn"  # what the child is to believe
    DupFd = _Inherited

    def __init__(
        self, process: BaseProcess, environment: Mapping[str, str], zygote: ZygoteClient, cancelled: threading.Event
    ) -> None:
        self._zygote = zygote
        self._cancelled = cancelled
        self._status: socket.socket | None = None
        self._poll_lock = threading.Lock()
        self._told_by: float | None = None
        super().__init__(process, environment)

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _make(self, data: int, alive: int) -> int:
        pid, self._status = self._zygote.fork(self._environment, data, alive, self._fds, self._cancelled)
        util.Finalize(self, self._status.close)  # not earlier: a thread may wait for it
        return pid

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        while self.returncode is None:
            status = self._status  # another thread may take it away
            signs: list[Any] = [self.sentinel] if status is None else [self.sentinel, status]
            ready = wait(signs, 0 if flag == os.WNOHANG else None)
            if not ready or (status is not None and status not in ready and not self._is_told(status, flag)):
                break
            with self._poll_lock:  # not while one waits: others only look
                if self.returncode is None:
                    self.returncode = self._exit_code()
        return self.returncode

    def _is_told(self, status: socket.socket, flag: int) -> bool:
        """Whether the zygote has said how the process ended, which has closed its files, or will not any more."""
        if self._told_by is None:
            self._told_by = time.monotonic() + STATUS_TIMEOUT
        left = max(0.0, self._told_by - time.monotonic())
        patience = min(left, ASIDE_TIMEOUT) if flag == os.WNOHANG else left
        return bool(wait([status], patience)) or flag != os.WNOHANG or not left

    def _exit_code(self) -> int | None:
        """What the zygote says of the process; None if only the zygote has ended."""
        if self._status is not None:
            with contextlib.suppress(OSError):  # it has said nothing
                if message := self._status.recv(64, socket.MSG_DONTWAIT):
                    return int(message)
            self._status = None
        return STATUS_UNKNOWN if wait([self.sentinel], 0) else None

    def close(self) -> None:
        super().close()
        if self._status is not None:
            self._status.close()


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def occupy_standard_streams() -> None:
    """Let no pipe take the number of a stream that is closed: a child would print into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _close_both(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
