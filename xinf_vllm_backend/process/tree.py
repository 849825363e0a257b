"""Record, kill and await a tree of processes."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterable

import psutil


class ProcessTree:
    """The processes of one engine, known by pid and creation time, so also after they were re-parented."""

    def __init__(self) -> None:
        self._known: set[psutil.Process] = set()
        self._lock = threading.Lock()

    def record(self, pids: Iterable[int | None]) -> None:
        """Remember the processes ``pids`` and all their descendants; those gone or never started are passed over."""
        for pid in pids:
            if pid is None:  # never started; psutil would take it for ourselves
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found = {process, *process.children(recursive=True)}
                with self._lock:
                    self._known = self._known | found  # a new set: another thread may be looking at the old one

    def alive(self) -> list[psutil.Process]:
        """Those recorded that still run; a zombie does not."""
        return [process for process in self._known if _runs(process)]

    def describe(self) -> list[dict[str, int | str]]:
        """Pid and title of each that runs, sorted by pid."""
        found: list[dict[str, int | str]] = []
        for process in sorted(self.alive(), key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append({"pid": process.pid, "title": " ".join(process.cmdline()).strip() or process.name()})
        return found

    def seconds_of_cpu(self, title: str = "") -> dict[int, float]:
        """Seconds of CPU that each process has used, by pid, with what those that it started use.

        Args:
            title: of the processes that are asked for, or a part of it; by default all.
        """
        found = {}
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    family = (process, *process.children(recursive=True))
                    found[process.pid] = sum(_seconds_of_cpu(member) for member in family)
        return found

    def kill(self, timeout: float) -> list[psutil.Process]:
        """SIGKILL all that was recorded, with descendants that came since, and wait up to ``timeout`` seconds.

        Returns:
            The processes that are still there, empty when all are gone.
        """
        self.record([process.pid for process in self.alive()])
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self.wait_gone(timeout)

    def wait_gone(self, timeout: float) -> list[psutil.Process]:
        """Wait up to ``timeout`` seconds until none of them runs; returns those that still do."""
        deadline = time.monotonic() + timeout
        for process in self.alive():
            _await_end(process, deadline)
        return self.alive()


def _await_end(process: psutil.Process, deadline: float) -> None:
    # Not psutil's wait: it would reap a child whose exit code its multiprocessing.Process still wants.
    with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(process.pid)) as handle:
        if _runs(process):  # the pid is not another's by now
            select.select([handle], [], [], max(0.0, deadline - time.monotonic()))


def _seconds_of_cpu(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:2])
    return 0.0


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
