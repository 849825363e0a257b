"""Record, kill and await a tree of processes."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Look:
    """What one look at the processes shows.

    Attributes:
        halted: whether one of them is stopped, as by SIGSTOP.
        workers: seconds of CPU used so far, by pid, of those with the title that was asked for.
        others: the same of the others.
    """

    halted: bool
    workers: dict[int, float]
    others: dict[int, float]


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

    def is_halted(self) -> bool:
        """Whether one of them is stopped, as by SIGSTOP."""
        return any(_status(process) == psutil.STATUS_STOPPED for process in self._known)

    def describe(self) -> list[dict[str, int | str]]:
        """Pid and title of each that runs, sorted by pid."""
        found: list[dict[str, int | str]] = []
        for process in sorted(self.alive(), key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append({"pid": process.pid, "title": " ".join(process.cmdline()).strip() or process.name()})
        return found

    def seconds_of_cpu(self, title: str) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of CPU that each process has used, by pid; of those with ``title`` in their title, and of the others.

        What a process starts that was not recorded counts as its own.
        """
        titled: dict[int, float] = {}
        others: dict[int, float] = {}
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                helpers = [child for child in process.children(recursive=True) if child not in self._known]
                used = sum(map(_seconds_of_cpu, (process, *helpers)))
                (titled if title in " ".join(process.cmdline()) else others)[process.pid] = used
        return titled, others

    def look(self, title: str) -> Look:
        return Look(self.is_halted(), *self.seconds_of_cpu(title))

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
        return sum(process.cpu_times()[:4])  # its own and that of children that have ended
    return 0.0


def _runs(process: psutil.Process) -> bool:
    return _status(process) not in (psutil.STATUS_ZOMBIE, None)


def _status(process: psutil.Process) -> str | None:
    """None where it is gone, and its pid may be another's."""
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None
