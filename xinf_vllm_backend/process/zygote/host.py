"""The host zygote: imports once what model processes and their engines need, and forks the model processes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from .. import prctl
from ..popen import occupy_standard_streams
from . import client
from .client import READY, ZygoteUnavailableError
from .manager import BaseZygote

COMMAND_TIMEOUT = 30.0  # seconds; Xinference gives a model process 60 to start
_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]


class HostZygote(BaseZygote):
    """A zygote that forks commands ``python -m module ...`` as children of this process.

    Args:
        python: the interpreter that it is, and whose commands it forks.
        environment: its environment, but for ``own``.
        own: variables that it has and its children have not.
        preload: name ``module:function`` of the function that imports what the children need.
        hazard: the same, of the function that says why a fork would not be clean.
        patient: whether it may be asked while it still imports.
    """

    def __init__(
        self,
        python: str,
        environment: Mapping[str, str],
        own: Mapping[str, str],
        preload: str,
        hazard: str,
        patient: bool = True,
    ) -> None:
        self._command = [python, "-m", __package__, preload, hazard]
        self._own = {**own, "OPENBLAS_NUM_THREADS": "1"}  # its threads would be started when it is loaded
        super().__init__(environment, patient)

    def command(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        blocked: Iterable[int] = (),
        cancelled: threading.Event | None = None,
    ) -> int:
        """Fork a child of this process that runs ``command`` as if it had been started here.

        Args:
            command: ``[python, "-m", module, ...]``.
            environment: all variables.
            blocked: the signals that it blocks.
            cancelled: gives up when it is set.

        Returns:
            Its pid. It is this process that reaps it.

        Raises:
            ZygoteUnavailableError: there is no child; the message says why.
        """
        request = {
            "command": list(command),
            "environment": dict(environment),
            "parent": os.getpid(),
            "blocked": sorted(blocked),
            "affinity": sorted(os.sched_getaffinity(0)),
            "limits": {number: resource.getrlimit(number) for number in _LIMITS},
            "umask": _umask(),
        }
        cancelled = cancelled or threading.Event()
        asked = self.client()
        occupy_standard_streams()
        with contextlib.ExitStack() as stack:
            directory = os.open(".", os.O_PATH)
            stack.callback(os.close, directory)
            try:
                stack.enter_context(prctl.adopting_orphans())
            except OSError as error:
                raise ZygoteUnavailableError(f"its child cannot become one of this process: {error}") from None
            status = stack.enter_context(asked.ask(request, [asked.requests.fileno(), directory, 0, 1, 2]))
            pid, between = client.heard_pids(status, cancelled, COMMAND_TIMEOUT)
            try:
                answer = client.heard(status, cancelled, COMMAND_TIMEOUT)
                if answer == READY:
                    return pid
                raise ZygoteUnavailableError(answer or "its child ended before it was ready")
            except ZygoteUnavailableError:
                _discard(pid, between, status)
                raise

    def _new_process(self, requests: socket.socket, ready: Connection) -> _HostProcess:
        return _HostProcess(self._command, self._environment, self._own, requests, ready)


class CommandPopen(subprocess.Popen[bytes]):
    """A command that a host zygote forked: a child of this process like any other.

    Args:
        zygote: forks it.
        command: see :meth:`HostZygote.command`, as the other arguments.

    Raises:
        ZygoteUnavailableError: there is no child.
    """

    def __init__(
        self,
        zygote: HostZygote,
        command: Sequence[str],
        environment: Mapping[str, str],
        blocked: Iterable[int],
        cancelled: threading.Event,
    ) -> None:
        self._fork = lambda: zygote.command(command, environment, blocked, cancelled)
        super().__init__(list(command))

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        self.pid = self._fork()  # type: ignore[no-untyped-call]
        del self._fork
        self._child_created = True


class _HostProcess:
    """A host zygote as :class:`.manager.BaseZygote` sees it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        own: Mapping[str, str],
        requests: socket.socket,
        ready: Connection,
    ) -> None:
        self._parent, self._alive = Pipe(duplex=False)
        fds = [requests.fileno(), ready.fileno(), self._parent.fileno()]
        others = {name: environment.get(name) for name in own}
        self._arguments = [*command, json.dumps({"fds": fds, "own": others})]
        self._environment = {**environment, **own}
        self._fds = fds

    def start(self) -> None:
        """Start it; raises OSError if it cannot be."""
        with self._parent:
            self._process = subprocess.Popen(
                self._arguments, env=self._environment, pass_fds=self._fds, stdin=subprocess.DEVNULL
            )

    def send_call(self, cancelled: threading.Event) -> None:
        """Nothing: all it needs is in its command line."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.returncode is not None:
            self._alive.close()

    def kill(self) -> None:
        self._process.kill()


def _discard(pid: int, between: int, status: socket.socket) -> None:
    """End and reap a child that did not become ready, and the process between if that lost the zygote as its parent."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ZygoteUnavailableError):  # "": no other process is on the way to it any more
        while client.heard(status, threading.Event(), COMMAND_TIMEOUT):
            pass
    for orphan in (pid, between):
        with contextlib.suppress(ChildProcessError):  # it never became ours
            os.waitpid(orphan, 0)


def _umask() -> int:
    """The umask of this process, without changing it for a moment, which its other threads would see."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
