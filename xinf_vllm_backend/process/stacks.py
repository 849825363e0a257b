"""The Python stacks of engine processes, also of those that hang.

Each process registers :mod:`faulthandler` for one signal, and tells its owner in which file it answers. The handler is
C code that takes no lock, so it also answers where a thread never releases the interpreter lock. It reads the stacks of
other threads without that lock: a thread that runs Python code meanwhile may crash the process, though rarely. So ask
only an engine that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

# A realtime signal, which the kernel never sends by itself. C libraries take the first ones (glibc 32 and 33, so that
# SIGRTMIN is 34; musl 34 too), debuggers and profilers the last ones; vLLM, torch and Python use none.
SIGNAL = signal.SIGRTMIN + 12
NAME = "xinf-vllm-stacks"
LIMIT = 20_000  # characters of each process; the first thread's stack comes last, and is kept
POLL = 0.01  # seconds between two looks for the answers


@dataclass(frozen=True)
class Stack:
    """What one process is doing.

    Attributes:
        pid: of the process.
        title: its name as :mod:`multiprocessing` has it, such as ``"EngineCore_DP0"``.
        text: the stacks of its threads, of 20,000 characters at most; or a sentence that says why there are none.
    """

    pid: int
    title: str
    text: str


def register() -> int | None:
    """Have this process answer; returns the file descriptor that it answers by, None if it cannot."""
    try:
        fd = _make_file()
        faulthandler.register(SIGNAL, fd, all_threads=True, chain=False)
    except OSError:
        return None
    return fd


def _make_file() -> int:
    try:
        fd = os.memfd_create(NAME)
    except (AttributeError, OSError):  # some builds of Python have none, some sandboxes refuse it
        fd, path = tempfile.mkstemp(prefix=NAME)
        os.unlink(path)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)  # an answer begins at the start of the file once that was emptied
    return fd


class StackReader:
    """Asks the processes that registered."""

    def __init__(self) -> None:
        self._known: dict[psutil.Process, tuple[int, str]] = {}

    def add(self, pid: int, fd: int, title: str) -> None:
        """Remember that the process ``pid`` answers by its file descriptor ``fd``."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known[psutil.Process(pid)] = (fd, title)

    def read(self, timeout: float) -> list[Stack]:
        """Ask all at once and wait up to ``timeout`` seconds for their answers; blocks, and never raises."""
        deadline = time.monotonic() + timeout
        questions = [_Question(process, fd, title) for process, (fd, title) in list(self._known.items())]
        for question in questions:
            question.ask()
        open_ones = questions
        while (open_ones := [one for one in open_ones if not one.is_settled()]) and time.monotonic() < deadline:
            time.sleep(POLL)
        return [question.stack(timeout) for question in questions]


class _Question:
    """What one process is asked, and its answer or why there is none."""

    def __init__(self, process: psutil.Process, fd: int, title: str) -> None:
        self._process = process
        self._title = title
        self._path = f"/proc/{process.pid}/fd/{fd}"
        self._file: BinaryIO | None = None  # ours: what is written stays when the process ends
        self._blocking: set[str] = set()  # threads that block the signal by themselves
        self._text = ""

    def ask(self) -> None:
        self._text = _why_silent(self._process)
        try:
            if not self._text and self._listens():
                self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115 - stack() closes it
                self._file.truncate(0)
                self._blocking = _blocking(self._process.pid)
                self._process.send_signal(SIGNAL)
        except (OSError, psutil.Error) as error:
            self._text = _why_silent(self._process) or f"It cannot be asked: {error}."

    def is_settled(self) -> bool:
        """Whether the answer is complete, or none will come."""
        self._text = self._text or self._whole_answer() or self._last_words()
        return bool(self._text)

    def stack(self, timeout: float) -> Stack:
        text = self._text or self._read() or self._late(timeout)
        if self._file is not None:
            self._file.close()
        return Stack(self._process.pid, self._title, text)

    def _listens(self) -> bool:
        """Whether it has its file and its handler; else the signal would end it."""
        caught = _masks(Path(f"/proc/{self._process.pid}/status"))["SigCgt"]
        if NAME in os.readlink(self._path) and _has_signal(caught):
            return True
        self._text = "It no longer answers: its handler or its file is gone."
        return False

    def _whole_answer(self) -> str:
        # The thread that handles the signal blocks it meanwhile: once something is written and none does, all is.
        is_being_written = not self._read() or _blocking(self._process.pid) - self._blocking
        return "" if is_being_written else self._read()

    def _last_words(self) -> str:
        why = _why_silent(self._process)
        return why and f"{self._read()}\n{why}".strip()

    def _read(self) -> str:
        """What is written by now, or its end."""
        if self._file is None:
            return ""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - LIMIT))
        text = self._file.read(LIMIT).decode(errors="replace")
        return text.strip() if size <= LIMIT else "..." + text[3:].rstrip()

    def _late(self, timeout: float) -> str:
        with contextlib.suppress(psutil.Error):
            return f"It did not answer within {timeout:g} s; its state is {self._process.status()}."
        return "It has ended."


def _why_silent(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        status = process.status() if process.is_running() else psutil.STATUS_ZOMBIE
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "It is stopped, as by SIGSTOP, and cannot answer."
        if status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return ""
    return "It has ended."


def _blocking(pid: int) -> set[str]:
    """The threads of ``pid`` that block the signal."""
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # it has ended
            if _has_signal(_masks(status)["SigBlk"]):
                found.add(status.parent.name)
    return found


def _masks(status: Path) -> Mapping[str, int]:
    """The sets of signals that a file ``/proc/*/status`` has, by name."""
    lines = (line.partition(":\t") for line in status.read_text().splitlines())
    return {name: int(mask, 16) for name, _, mask in lines if name.startswith("Sig") and name != "SigQ"}


def _has_signal(mask: int) -> bool:
    return bool(mask >> (SIGNAL - 1) & 1)
