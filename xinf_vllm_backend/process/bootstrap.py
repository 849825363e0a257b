"""The first function that an engine process runs.

In this order: bind to the parent, set the environment, report to the owner, send the output to the parent's pipe, and
only then unpickle and call the real target. Nothing heavy is imported before the environment is set.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NoReturn

from . import cleanup, stacks, threads
from .popen import Alive

if TYPE_CHECKING:
    from .zygote.client import ZygoteClient

PID_REPORT = "pid: "  # begins the first report of each process
FORKED, SPAWNED = "forked", "spawned"  # how a process came to be


@dataclass(frozen=True)
class InheritedHandles:
    """What a child shares with its own children.

    Attributes:
        reports: write end of the pipe that :func:`report` uses.
        zygote: where to have children forked; None to spawn them.
        mark: part of the names of all shared memory that they make (see :mod:`.cleanup`); "" for none.
        alive: held open until this process ends; its files are not removed before.
    """

    reports: Connection | None = None
    zygote: ZygoteClient | None = None
    mark: str = ""
    alive: Connection | None = None


@dataclass(frozen=True)
class ChildSetup:
    """What a child is given in addition to its target.

    Attributes:
        environment: all its variables.
        handles: what it shares with its own children.
        output: write end of the pipe that takes the child's stdout and stderr; None to inherit the parent's.
        alive: the child's end of the pipe by which the parent sees its end, and it the parent's; a descriptor there.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    handles: InheritedHandles = InheritedHandles()
    output: Connection | None = None
    alive: int | Alive = field(default_factory=Alive)


was_forked = False  # by the zygote
_handles = InheritedHandles()


def inherited_handles() -> InheritedHandles:
    """What this process shares with its own children; empty outside an engine process."""
    return _handles


def report(message: str) -> None:
    """Tell the process that owns the engine what this one is doing now; a no-op outside an engine process."""
    if _handles.reports is not None:
        # The owner may be gone or no longer listening; a lost report does no harm.
        with contextlib.suppress(OSError):
            _handles.reports.send_bytes(message.encode())


def run(setup: ChildSetup, call: bytes) -> None:
    """Run the pickled ``(initializer, target, args, kwargs)`` in this child as ``setup`` says."""
    global _handles
    parent = multiprocessing.parent_process()
    if parent is not None:
        assert isinstance(setup.alive, int)
        kill_with(setup.alive)
        threading.Thread(target=_exit_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()
    _handles = setup.handles
    set_environment(setup.environment)
    _report_start()
    if was_forked:
        threads.apply_thread_limits()
    if _handles.mark:
        cleanup.name_after(_handles.mark)
    _redirect_output(setup.output)
    initializer, target, args, kwargs = pickle.loads(call)
    if initializer is not None:
        initializer()
    target(*args, **kwargs)


def _report_start() -> None:
    """Report the pid, how it came to be, and by what file and under what name it answers questions for its stacks."""
    if _handles.reports is None:
        return
    fd = stacks.register()
    answers = "" if fd is None else f" {fd} {multiprocessing.current_process().name}"
    report(f"{PID_REPORT}{os.getpid()} {FORKED if was_forked else SPAWNED}{answers}")


def exit_fast(exit_code: int) -> NoReturn:
    """Run what is registered with :mod:`atexit`, flush the output, and end this process.

    To free everything that an engine process imported takes seconds; the kernel does it at once.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
                stream.flush()
    finally:
        os._exit(exit_code)


def kill_with(fd: int) -> None:
    """Have the kernel kill this process, where it can, when the other end of the pipe ``fd`` is closed.

    Also one that is stopped or never releases the interpreter lock; unlike with PR_SET_PDEATHSIG, when the parent
    process ends and not the thread that started the child. No byte may pass the pipe: the kernel tells of that, too,
    and only after the other end has seen it.
    """
    with contextlib.suppress(AttributeError, OSError):  # no F_SETSIG: not Linux
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([fd], 0):  # it was closed before
        os._exit(1)


def _exit_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def set_environment(environment: Mapping[str, str]) -> None:
    """Make ``environment`` that of this process."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:  # setproctitle needs unchanged variables to stay in place
            os.environ[name] = value


def _redirect_output(output: Connection | None) -> None:
    if output is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        output.close()
    # A pipe is block-buffered by default, and what is in the buffer is lost with a killed process.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
