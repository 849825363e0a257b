"""How an engine process comes into being: spawned, or forked by the zygote.

Both run multiprocessing's own child side, with the environment they are given in place of the parent's.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import popen_fork, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import get_spawning_popen, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .zygote.client import ZygoteClient

STATUS_TIMEOUT = 5.0  # seconds that the zygote has to report the exit code of a child that has ended
LOOK_TIMEOUT = 0.1  # seconds of these that a poll which should not block waits
STATUS_UNKNOWN = 255  # exit code of a process whose zygote died before it
POLL = 0.1  # seconds until a cancelled send_call() returns


class _EnginePopen(popen_fork.Popen):
    """A process that is started in two steps: made here, and given its call by :meth:`send_call`.

    Two pipes connect it with this process, and each side sees by them when the other ends.
    """

    def __init__(self, process: BaseProcess, environment: Mapping[str, str]) -> None:
        self._fds: list[int] = []
        self._environment = environment
        self._call = memoryview(b"")
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        with contextlib.ExitStack() as stack:
            child_r, parent_w = _pipe(stack)
            self.sentinel, self.alive = _pipe(stack)
            self._call = self._pickled(process)
            self.pid = self._make(child_r, self.alive)
            os.close(child_r)  # or a write to a child that has ended would wait instead of failing
            os.close(self.alive)
            stack.pop_all()
        # The child sees that we are gone when the last copy of parent_w is closed, and only we have it.
        self.finalizer = util.Finalize(self, _close_both, (self.sentinel, parent_w))
        os.set_blocking(parent_w, False)
        self._input = io.FileIO(os.dup(parent_w), "w")  # its own: a stop may close parent_w meanwhile

    def send_call(self, cancelled: threading.Event) -> bool:
        """Send the process what it is to run; waits until it has room for that, ends, or ``cancelled`` is set.

        To be called once.

        Returns:
            False if ``cancelled`` was set first.
        """
        room = select.poll()
        room.register(self._input, select.POLLOUT)
        with self._input, contextlib.suppress(BrokenPipeError):  # it has ended: its exit code and output tell how
            while self._call:
                written = self._input.write(self._call)
                if written is None:
                    if cancelled.is_set():
                        return False
                    room.poll(POLL * 1000)
                self._call = self._call[written or 0 :]
        self._call = memoryview(b"")
        return True

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
    """Unpickles in the child to the descriptor whose closing tells its end; forks of that have to close it."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[int, ...]]:
        popen = get_spawning_popen()
        return (_inherited_alive, ()) if isinstance(popen, ZygotePopen) else (int, (popen.alive,))  # type: ignore[union-attr]


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
    """Pickled in place of a file descriptor: its index among those that are sent to the zygote."""

    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        return inherited[self.index]


inherited: list[int] = []  # the file descriptors that a child of the zygote was sent
inherited_alive = -1  # and the one whose closing tells its end


def _inherited_alive() -> int:
    return inherited_alive


class ZygotePopen(_EnginePopen):
    """A child of the zygote.

    Raises:
        ZygoteUnavailableError: the zygote made no child, and will make none.
    """

    method = "spawn"  # as the child sees it
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
        util.Finalize(self, self._status.close)  # not by close(): another thread may wait for it
        return pid

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        while self.returncode is None:
            status = self._status  # another thread may set it to None
            signs: list[Any] = [self.sentinel] if status is None else [self.sentinel, status]
            ready = wait(signs, 0 if flag == os.WNOHANG else None)
            if not ready or (status is not None and status not in ready and not self._is_told(status, flag)):
                break
            with self._poll_lock:  # not held while a thread waits
                if self.returncode is None:
                    self.returncode = self._exit_code()
        return self.returncode

    def _is_told(self, status: socket.socket, flag: int) -> bool:
        """Whether the zygote has reported the exit code of the ended process, or had its time for that."""
        if self._told_by is None:
            self._told_by = time.monotonic() + STATUS_TIMEOUT
        left = max(0.0, self._told_by - time.monotonic())
        patience = min(left, LOOK_TIMEOUT) if flag == os.WNOHANG else left
        return bool(wait([status], patience)) or flag != os.WNOHANG or not left

    def _exit_code(self) -> int | None:
        """The exit code that the zygote reported; None if the zygote has ended and the process has not."""
        if self._status is not None:
            with contextlib.suppress(OSError):  # nothing was reported
                if message := self._status.recv(64, socket.MSG_DONTWAIT):
                    return int(message)
            self._status = None
        return STATUS_UNKNOWN if wait([self.sentinel], 0) else None


class EndedPopen(popen_fork.Popen):
    """Stands for a process that has ended, once nothing but its pid and exit code is of interest.

    The files of ``popen`` are closed when the last thread that waits for them has left it.
    """

    def __init__(self, popen: popen_fork.Popen) -> None:
        self.pid = popen.pid
        self.returncode = popen.returncode
        self.finalizer = None


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def occupy_standard_streams() -> None:
    """Open the null device for closed standard streams, lest a pipe gets their number and a child prints into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _close_both(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
