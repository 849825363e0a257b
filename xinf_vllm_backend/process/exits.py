"""How processes end, in words."""

from __future__ import annotations

import signal
import sys
import threading
from multiprocessing.process import BaseProcess

import psutil

from . import bootstrap

EXIT_REPORT = "exit: "  # begins the report on a process that ended with an error


def describe_exit(name: str, pid: int | None, exit_code: int) -> str:
    """How a process ended: ``"EngineCore (pid 12) was killed by SIGKILL"``."""
    who = f"{name} (pid {pid})"
    if exit_code >= 0:
        return f"{who} exited with status {exit_code}"
    try:
        by = signal.Signals(-exit_code).name
    except ValueError:
        by = f"signal {-exit_code}"
    hint = ", as the kernel does when memory runs out" if by == "SIGKILL" and _memory_is_short() else ""
    return f"{who} was killed by {by}{hint}"


def announce_exit(process: BaseProcess) -> None:
    """Print and report how ``process`` ends, unless with status 0: its parent may say less, or nothing."""

    def watch() -> None:
        process.join()
        exit_code = process.exitcode
        if exit_code:
            how = describe_exit(process.name, process.pid, exit_code)
            sys.stderr.write(how + "\n")
            bootstrap.report(EXIT_REPORT + how)

    threading.Thread(target=watch, name=f"{process.name}-exit", daemon=True).start()


def _memory_is_short() -> bool:
    memory = psutil.virtual_memory()
    return memory.available < memory.total * 0.1
