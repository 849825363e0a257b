"""What the zygote runs: it imports, forks on request, and reports the exit codes of its children."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from .. import bootstrap, prctl
from ..title import set_title
from . import checked, requests
from .client import MAX_FDS, MAX_MESSAGE, READY
from .preloaded import Preloaded
from .requests import CallRequest, CommandRequest

TITLE = "xinf-vllm host zygote"  # in ps

Request = CallRequest | CommandRequest


def serve(
    asked: socket.socket,
    ready: Connection,
    preload: Callable[[], None],
    hazard: Callable[[], str | None],
    alive: int,
) -> None:
    """What the zygote runs; returns when its model process has ended, and in each child when that has run."""
    parent = parent_process()
    assert parent is not None and parent.sentinel is not None
    bootstrap.kill_with(alive)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the model process
    set_title("xinf-vllm zygote")
    gc.disable()  # what imports make is kept, and pages of frozen objects stay shared with the children
    preload()
    gc.freeze()
    with ready:
        ready.send_bytes(b"ready")
    _serve(_Server(asked, (parent.sentinel, alive), hazard), on_interrupt)


def serve_host(
    asked: socket.socket,
    ready: Connection,
    preload: Callable[[], None],
    hazard: Callable[[], str | None],
    parent: int,
    own: Mapping[str, str | None],
) -> None:
    """What a host zygote runs, a fresh process: as :func:`serve`, and it forks commands, too.

    Args:
        parent: read end of a pipe that is closed when the worker ends.
        own: see :meth:`.Preloaded.by`.
    """
    bootstrap.kill_with(parent)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title(TITLE)
    gc.disable()
    preloaded = Preloaded.by(preload, own)
    gc.freeze()
    with ready:
        ready.send_bytes(b"ready")
    _serve(_Server(asked, (parent,), hazard, preloaded), on_interrupt)


def _serve(server: _Server, on_interrupt: Any) -> None:
    request = server.run()
    if request is not None:
        signal.signal(signal.SIGINT, on_interrupt)  # ignored, too, in what a shell runs in the background
        sys.exit(request.run(server.preloaded))


class _Server:
    """Forks on request, and reports the exit codes of the children.

    Args:
        asked: where requests come from.
        fds: of this process alone; the first is the pipe that is closed when its parent ends.
        hazard: see :class:`.manager.BaseZygote`.
        preloaded: what a command finds imported; None: no commands are forked.
    """

    def __init__(
        self,
        asked: socket.socket,
        fds: Sequence[int],
        hazard: Callable[[], str | None],
        preloaded: Preloaded | None = None,
    ) -> None:
        self.preloaded = preloaded
        self._requests = asked
        self._parent = fds[0]
        self._hazard = hazard
        self._outdated = False  # and to be replaced
        self._children: dict[int, _Child] = {}  # by pid
        self._wakeup, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds = (*fds, self._wakeup, wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def run(self) -> Request | None:
        """Serve until the parent has ended or its modules are outdated; in a child return its request at once."""
        while not self._outdated:
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
        return None

    def _answer(self) -> Request | None:
        message, received, _, _ = socket.recv_fds(self._requests, MAX_MESSAGE, MAX_FDS + 8, socket.MSG_CMSG_CLOEXEC)
        if not received:  # no client is left
            raise SystemExit
        status, fds = socket.socket(fileno=received[0]), received[1:]
        request = requests.parse(message, fds)
        reason = self._why_not(request, status)
        if reason is None:
            try:
                if self._forks(request, status):
                    return request
            except OSError as error:
                reason = str(error)
        for fd in fds:
            os.close(fd)
        if reason is not None:
            _tell(status, reason)
            status.close()
        return None

    def _why_not(self, request: Request, status: socket.socket) -> str | None:
        with contextlib.suppress(BlockingIOError):
            status.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return "the client has given up"
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            return f"it has {threads} threads"
        if isinstance(request, CallRequest):
            return self._hazard()
        if self.preloaded is None:
            return "it forks no commands"
        if changed := self.preloaded.outdated():
            self._outdated = True
            return f"{changed} has changed since it was imported, and the zygote is replaced"
        return self._hazard() or self.preloaded.why_not(request.details["environment"])

    def _forks(self, request: Request, status: socket.socket) -> bool:
        """Fork a process for ``request``; True in that, where it is to be run."""
        sys.stdout.flush()
        sys.stderr.flush()
        released, release = os.pipe2(os.O_CLOEXEC)
        try:
            pid = checked.fork(self._hazard)
        except OSError:
            os.close(released)
            os.close(release)
            raise
        if pid == 0:
            self._leave()
            os.close(release)
            if isinstance(request, CommandRequest):
                _become_orphan(status, released, request.parent)
            os.close(released)
            status.close()
            return True
        os.close(released)
        if isinstance(request, CallRequest):
            os.close(release)
            _tell(status, f"pid {pid}")
            release = -1
        self._children[pid] = _Child(status, release)
        return False

    def _leave(self) -> None:
        """Close in a child what belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._requests.close()
        for child in self._children.values():
            child.close()
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
            child = self._children.pop(pid, None)
            if child is not None:  # else a process that an import had started, or a child that was not clean
                child.ended(os.waitstatus_to_exitcode(how))


@dataclass(frozen=True)
class _Child:
    """A child of the zygote: a call, or the parent of a command until that is an orphan.

    Attributes:
        status: where the one who asked is answered.
        release: end of a pipe by which a command learns that it is an orphan now; -1 for a call.
    """

    status: socket.socket
    release: int

    def ended(self, exit_code: int) -> None:
        if self.release < 0:
            _tell(self.status, str(exit_code))
        elif exit_code == 0:
            with contextlib.suppress(BrokenPipeError):  # it was killed meanwhile
                os.write(self.release, b"1")
        self.close()

    def close(self) -> None:
        self.status.close()
        if self.release >= 0:
            os.close(self.release)


def _become_orphan(status: socket.socket, released: int, parent: int) -> None:
    """Fork again, and end; the process that is left is the child of ``parent``, which adopts orphans."""
    try:
        pid = os.fork()
        if pid:
            _tell(status, f"pid {pid} {os.getpid()}")
            os._exit(0)
        if not os.read(released, 1):  # the zygote was killed
            os._exit(1)
        prctl.die_with(parent)
    except OSError as error:
        _tell(status, str(error))
        os._exit(1)
    _tell(status, READY)


def _tell(asker: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # the client is gone
        asker.send(message.encode()[:4000], socket.MSG_DONTWAIT)
