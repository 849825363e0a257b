"""What the zygote runs: it imports, forks on request, and reports the exit codes of its children."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process, spawn
from multiprocessing.connection import Connection, wait

from .. import bootstrap, popen
from . import checked
from .client import MAX_FDS


def serve(
    requests: socket.socket,
    ready: Connection,
    preload: Callable[[], None],
    hazard: Callable[[], str | None],
    alive: int,
) -> None:
    """What the zygote runs; returns when its model process has ended, and in each child when that has run."""
    parent = parent_process()
    assert parent is not None and parent.sentinel is not None
    bootstrap.kill_with(parent.sentinel)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the model process
    _name("xinf-vllm zygote")
    gc.disable()  # what imports make is kept, and pages of frozen objects stay shared with the children
    preload()
    gc.freeze()
    with ready:
        ready.send_bytes(b"ready")
    request = _Server(requests, parent.sentinel, alive, hazard).run()
    if request is not None:
        signal.signal(signal.SIGINT, on_interrupt)  # ignored, too, in what a shell runs in the background
        sys.exit(request.run())


@dataclass(frozen=True)
class _ForkRequest:
    """What a child was sent."""

    affinity: set[int]
    data: int
    streams: Sequence[int]
    fds: Sequence[int]

    def run(self) -> int:
        """Set this process up as a spawned one, and run it; returns the exit code."""
        gc.enable()
        with contextlib.suppress(OSError):  # not all of these CPUs are ours
            os.sched_setaffinity(0, self.affinity)
        for fd, stream in zip((1, 2), self.streams, strict=True):
            os.dup2(stream, fd)
            os.close(stream)
        if "numpy" in sys.modules:  # the standard library's generator does so by itself
            sys.modules["numpy"].random.seed()
        popen.inherited[:] = self.fds
        bootstrap.was_forked = True
        return spawn._main(self.data, os.dup(self.data))


class _Server:
    """Forks on request, and reports the exit codes of the children."""

    def __init__(self, requests: socket.socket, parent: int, alive: int, hazard: Callable[[], str | None]) -> None:
        self._requests = requests
        self._parent = parent
        self._hazard = hazard
        self._children: dict[int, socket.socket] = {}  # by pid: the sockets that get their exit codes
        self._wakeup, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds = (parent, alive, self._wakeup, wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def run(self) -> _ForkRequest | None:
        """Serve until the parent has ended; in a child return at once, with what it was sent."""
        while True:
            signs = wait([self._parent, self._wakeup, self._requests])
            if self._parent in signs:
                return None
            if self._wakeup in signs:
                os.read(self._wakeup, 4096)
                self._reap()
            if self._requests in signs:
                request = self._answer()
                if request is not None:
                    return request

    def _answer(self) -> _ForkRequest | None:
        message, received, _, _ = socket.recv_fds(self._requests, 1 << 16, MAX_FDS + 8, socket.MSG_CMSG_CLOEXEC)
        if not received:  # no client is left
            raise SystemExit
        status, fds = socket.socket(fileno=received[0]), received[1:]
        pid = self._fork(status)
        if pid == 0:
            status.close()
            self._leave()
            data, _alive, stdout, stderr, *others = fds  # alive is closed when the process ends
            return _ForkRequest(pickle.loads(message), data, (stdout, stderr), others)
        for fd in fds:
            os.close(fd)
        if pid is None:
            status.close()
        else:
            self._children[pid] = status
            _tell(status, f"pid {pid}")
        return None

    def _fork(self, status: socket.socket) -> int | None:
        with contextlib.suppress(BlockingIOError):
            status.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return None  # the client has given up
        threads = len(os.listdir("/proc/self/task"))
        reason = f"it has {threads} threads" if threads > 1 else self._hazard()
        if reason is None:
            sys.stdout.flush()
            sys.stderr.flush()
            try:
                return checked.fork(self._hazard)
            except OSError as error:
                reason = str(error)
        _tell(status, reason)
        return None

    def _leave(self) -> None:
        """Close in a child what belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._requests.close()
        for status in self._children.values():
            status.close()
        for fd in self._fds:
            os.close(fd)

    def _reap(self) -> None:
        while True:
            try:
                pid, how = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # there are none
                return
            if pid == 0:
                return
            status = self._children.pop(pid, None)
            if status is not None:  # else a process that an import had started, or a child that was not clean
                with status:
                    _tell(status, str(os.waitstatus_to_exitcode(how)))


def _name(title: str) -> None:
    # Before the environment changes: setproctitle has to find where the title goes, also for the children.
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)


def _tell(asker: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # the client is gone
        asker.send(message.encode()[:4000], socket.MSG_DONTWAIT)
