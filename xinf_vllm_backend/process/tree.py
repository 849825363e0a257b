"""Record, kill and await a tree of processes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait

import psutil

POLL = 0.02  # seconds between two looks at a process whose end the kernel does not tell


@dataclass(frozen=True)
class Look:
    """What the processes of a tree did when they were looked at.

    Attributes:
        halted: pids of those that are stopped, as by SIGSTOP.
        workers: seconds of CPU used so far, by pid, of those with the title that was asked for.
        others: the same, of all others.
    """

    halted: frozenset[int]
    workers: dict[int, float]
    others: dict[int, float]

    def of(self, pids: Collection[int]) -> Look:
        """What those of them did that are among ``pids``."""
        workers, others = (
            {pid: seconds for pid, seconds in used.items() if pid in pids} for used in (self.workers, self.others)
        )
        return Look(self.halted.intersection(pids), workers, others)

    def without(self, pids: Collection[int]) -> Look:
        """What the rest of them did."""
        return self.of((self.halted | self.workers.keys() | self.others.keys()).difference(pids))


class ProcessTree:
    """The processes of one engine, known by pid and creation time, so also after they were re-parented."""

    def __init__(self) -> None:
        self._known: set[psutil.Process] = set()
        self._lock = threading.Lock()

    def record(self, pids: Iterable[int | None]) -> None:
        """Remember the processes ``pids`` and all their descendants; skips those gone or never started."""
        for pid in pids:
            if pid is None:  # never started; psutil would take it for this process
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found = {process, *process.children(recursive=True)}
                with self._lock:
                    self._known = self._known | found  # a new set: another thread may iterate over the old one

    def alive(self) -> list[psutil.Process]:
        """Those recorded that still run, be it in one thread; a zombie does not."""
        return [process for process in self._known if _runs(process)]

    def is_halted(self) -> bool:
        """Whether one of them is stopped, as by SIGSTOP."""
        return bool(self._halted())

    def _halted(self) -> frozenset[int]:
        return frozenset(process.pid for process in self._known if _status(process) == psutil.STATUS_STOPPED)

    def describe(self) -> list[dict[str, int | str]]:
        """Pid and title of each that runs, sorted by pid."""
        found: list[dict[str, int | str]] = []
        for process in sorted(self.alive(), key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append({"pid": process.pid, "title": _title(process) or process.name()})
        return found

    def look(self, title: str) -> Look:
        """What the processes do, those with ``title`` in their titles apart; reads ``/proc`` once and blocks for that.

        What a process starts that is not recorded counts as its own.
        """
        children = _by_parent()
        workers: dict[int, float] = {}
        others: dict[int, float] = {}
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = sum(map(_seconds_of_cpu, (process, *self._helpers(process, children))))
                (workers if title in _title(process) else others)[process.pid] = used
        return Look(self._halted(), workers, others)

    def _helpers(self, process: psutil.Process, children: Mapping[int, list[psutil.Process]]) -> list[psutil.Process]:
        """Its descendants down to those that are recorded, which count for themselves."""
        found = [child for child in children.get(process.pid, ()) if child not in self._known]
        return [*found, *(helper for child in found for helper in self._helpers(child, children))]

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


def waits_by() -> str:
    """How this process waits for the ends of others: ``"pidfd"``, or ``"polling"`` where there is no pidfd."""
    handle = _pidfd(os.getpid())
    if handle is None:
        return "polling"
    os.close(handle)
    return "pidfd"


def _await_end(process: psutil.Process, deadline: float) -> None:
    # Not psutil's wait: it would reap a child whose exit code its multiprocessing.Process still wants.
    handle = _pidfd(process.pid)
    with contextlib.ExitStack() as stack:
        if handle is not None:
            stack.callback(os.close, handle)
        while _runs(process) and (left := deadline - time.monotonic()) > 0:
            if handle is None:
                time.sleep(min(left, POLL))
            else:
                wait([handle], left)


def _pidfd(pid: int) -> int | None:
    """None where Python has no pidfd, the kernel refuses it, or the process is gone."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _by_parent() -> dict[int, list[psutil.Process]]:
    """All processes there are, by the pid of their parent."""
    found: dict[int, list[psutil.Process]] = defaultdict(list)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.ppid()].append(process)
    return found


def _seconds_of_cpu(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:4])  # its own and that of children that have ended
    return 0.0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.ZombieProcess:  # its first thread has ended, and took the title with it
        return ""


def _runs(process: psutil.Process) -> bool:
    status = _status(process)
    return _has_threads(process) if status == psutil.STATUS_ZOMBIE else status is not None


def _has_threads(zombie: psutil.Process) -> bool:
    """Whether other threads outlive the first one of a process, which alone makes it look like a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return zombie.num_threads() > 1
    return False


def _status(process: psutil.Process) -> str | None:
    """None where it is gone, and its pid may be another's."""
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None
