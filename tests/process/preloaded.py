"""What the zygotes of these tests import, and why they may not fork; each function is called in the zygote."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import blocking_at_import

_kept: list[object] = []


def modules(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


def behind(gate: blocking_at_import.Gate) -> Callable[[], None]:
    """A preload that waits until ``gate`` is opened, each time."""
    return functools.partial(blocking_at_import.wait_at, gate.environment[blocking_at_import.VARIABLE])


def a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def and_raise(attempts: Path) -> None:
    _count(attempts)
    raise ImportError("no such library")


def and_die(attempts: Path) -> None:
    _count(attempts)
    os.kill(os.getpid(), signal.SIGKILL)


def a_process(pid_file: Path) -> None:
    """Leave a process behind that nobody waits for, as some libraries do."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ends with us
    pid_file.write_text(str(process.pid))
    _kept.append(process)


def a_stall_of_each_child() -> None:
    """Have each child of the zygote stop before it reads anything."""
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _count(attempts: Path) -> None:
    with attempts.open("a") as file:
        file.write("x")


# -- hazards


def a_hazard() -> str:
    return "it has initialised an accelerator"


def a_hazard_unless(path: Path) -> str | None:
    return None if path.exists() else "it is not the time"


def a_hazard_that_raises() -> str | None:
    raise RuntimeError("the driver is gone")
