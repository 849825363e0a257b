"""The first function that an engine process runs.

In this order: bind to the parent, set the environment, send the output to the parent's pipe, and only then unpickle
and call the real target. Nothing heavy is imported before the environment is set.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class ChildSetup:
    """What a child is given beside its target.

    Attributes:
        environment: variables to set, over those inherited.
        output: write end of the pipe that takes the child's stdout and stderr; None to inherit the parent's.
        reports: write end of the pipe that :func:`report` uses, in this child and in its own children.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    output: Connection | None = None
    reports: Connection | None = None


_setup = ChildSetup()


def reports() -> Connection | None:
    """The write end that this process reports to, for its own children to share."""
    return _setup.reports


def report(message: str) -> None:
    """Tell the process that owns the engine what this one is doing now; a no-op outside an engine process."""
    if _setup.reports is not None:
        # The owner may be gone or no longer listening: a report is never worth failing for.
        with contextlib.suppress(OSError):
            _setup.reports.send_bytes(message.encode())


def run(setup: ChildSetup, call: bytes) -> None:
    """Run the pickled ``(initializer, target, args, kwargs)`` in this child as ``setup`` says."""
    global _setup
    parent = multiprocessing.parent_process()
    if parent is not None:
        bind_to(parent.sentinel)
    os.environ.update(setup.environment)
    _setup = setup
    _redirect_output(setup.output)
    initializer, target, args, kwargs = pickle.loads(call)
    if initializer is not None:
        initializer()
    target(*args, **kwargs)


def bind_to(sentinel: int) -> None:
    """End this process, whatever it is doing, when the write end of the pipe ``sentinel`` is closed.

    The thread is enough for a process that runs. The kernel's signal also ends one that is stopped or that never
    lets go of the interpreter lock; unlike PR_SET_PDEATHSIG it waits for the parent, not for the parent's thread.
    """
    with contextlib.suppress(AttributeError, OSError):  # no F_SETSIG: not Linux
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_exit_with, args=(sentinel,), name="parent-watch", daemon=True).start()


def _exit_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


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
