"""The output of engine processes: passed on as it comes, its last lines kept for error messages."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

logger = logging.getLogger(__name__)

MAX_LINES = 2000  # a failing engine with 8 Workers prints some 600
MAX_LINE_LENGTH = 2000  # characters


class OutputTail:
    """The last lines of a group of processes; bounded, and safe to read from any thread.

    Args:
        max_lines: that are kept.
        on_line: called with each line as it comes, on the thread that reads it; must not fail.
    """

    def __init__(self, max_lines: int = MAX_LINES, on_line: Callable[[str], None] = lambda line: None) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._on_line = on_line

    def append(self, line: str) -> None:
        line = line[:MAX_LINE_LENGTH]
        self._lines.append(line)
        self._on_line(line)

    def lines(self) -> list[str]:
        return list(self._lines)

    def clear(self) -> None:
        self._lines.clear()


class ChildOutput(threading.Thread):
    """Reads one child's output and reports until the child and all its descendants are gone."""

    def __init__(
        self,
        name: str,
        output: Connection,
        reports: Connection,
        tail: OutputTail,
        on_report: Callable[[str], None] | None,
    ) -> None:
        super().__init__(name=f"{name}-output", daemon=True)
        self._output = output
        self._reports = reports
        self._tail = tail
        self._on_report = on_report
        self._rest = b""

    def run(self) -> None:
        open_ends = {self._output, self._reports}
        while open_ends:
            for end in wait(list(open_ends)):
                more = self._read_output() if end is self._output else self._read_report()
                if not more:
                    open_ends.discard(end)
        if self._rest:
            self._tail.append(_text(self._rest))
        self.close()

    def close(self) -> None:
        self._output.close()
        self._reports.close()
        self._on_report = None  # it may hold us

    def _read_output(self) -> bool:
        data = os.read(self._output.fileno(), 1 << 16)
        _pass_on(data)
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = self._rest[: 4 * MAX_LINE_LENGTH]  # a character has at most 4 bytes
        for line in lines:
            if line.strip():
                self._tail.append(_text(line))
        return bool(data)

    def _read_report(self) -> bool:
        try:
            message = self._reports.recv_bytes().decode()
        except EOFError:
            return False
        if self._on_report is not None:
            try:
                self._on_report(message)
            except Exception:  # go on reading, or the child would block
                logger.exception("A report of %s could not be handled: %s", self.name, message)
        return True


def _pass_on(data: bytes) -> None:
    with contextlib.suppress(OSError):  # our own stderr is closed
        while data:
            data = data[os.write(2, data) :]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip()
