"""What a zygote is asked to fork: a call, as a child of its own, or a command, as a child of the one who asks."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from typing import Any

from .. import bootstrap, popen, threads
from ..title import set_title
from . import client
from . import preloaded as preloaded_module
from .preloaded import Preloaded


@dataclass(frozen=True)
class CallRequest:
    """What a child of multiprocessing was sent."""

    affinity: Sequence[int]
    data: int
    alive: int
    streams: Sequence[int]
    fds: Sequence[int]

    def run(self, preloaded: Preloaded | None) -> int:
        """Set this process up as a spawned one, and run it; returns the exit code."""
        gc.enable()
        _pin(self.affinity)
        _take_streams(dict(zip((1, 2), self.streams, strict=True)))
        _reseed()
        popen.inherited[:] = self.fds
        popen.inherited_alive = self.alive
        bootstrap.was_forked = True
        return spawn._main(self.data, os.dup(self.data))


@dataclass(frozen=True)
class CommandRequest:
    """A command line ``python -m module ...``, and what a process inherits from its parent.

    Attributes:
        parent: pid of the process that asks, and becomes the parent.
        details: see :meth:`.host.HostZygote.command`.
    """

    parent: int
    details: Mapping[str, Any]
    directory: int
    streams: Sequence[int]
    requests: int

    def run(self, preloaded: Preloaded | None) -> int:
        """Set this process up as one that was started by the command, and run that; returns the exit code."""
        assert preloaded is not None
        gc.enable()
        preloaded_module.of_this_process = preloaded
        client.host = client.ZygoteClient(socket.socket(fileno=self.requests), client.frozen(os.environ))
        self._inherit()
        command = self.details["command"]
        set_title(" ".join(command), os.path.basename(command[0]))
        bootstrap.set_environment(preloaded.applied_to(self.details["environment"]))
        _reseed()
        multiprocessing.current_process().authkey = os.urandom(32)
        threads.apply_thread_limits()
        sys.orig_argv[:] = command
        sys.argv[:] = command[2:]
        sys.path[0] = ""
        with contextlib.suppress(FileNotFoundError):  # it was removed
            sys.path[0] = os.getcwd()
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        return 0

    def _inherit(self) -> None:
        os.fchdir(self.directory)
        os.close(self.directory)
        os.umask(self.details["umask"])
        for name, limits in self.details["limits"].items():
            if resource.getrlimit(int(name)) != tuple(limits):
                resource.setrlimit(int(name), limits)
        _pin(self.details["affinity"])
        _take_streams(dict(enumerate(self.streams)))
        signal.pthread_sigmask(signal.SIG_SETMASK, self.details["blocked"])


def parse(message: bytes, fds: Sequence[int]) -> CallRequest | CommandRequest:
    """The request in ``message``, with the file descriptors that came with it."""
    details = json.loads(message)
    if "command" in details:
        requests, directory, *streams = fds
        return CommandRequest(details["parent"], details, directory, streams, requests)
    data, alive, stdout, stderr, *others = fds
    return CallRequest(details["affinity"], data, alive, (stdout, stderr), others)


def _pin(affinity: Sequence[int]) -> None:
    with contextlib.suppress(OSError):  # not all of these CPUs are ours
        os.sched_setaffinity(0, affinity)


def _take_streams(streams: Mapping[int, int]) -> None:
    for fd, stream in streams.items():
        os.dup2(stream, fd)
        os.close(stream)


def _reseed() -> None:
    """Give the generators that a fresh process seeds by chance another seed; the standard library's does so itself."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    generator = getattr(sys.modules.get("torch"), "default_generator", None)
    if generator is not None:
        generator.seed()
