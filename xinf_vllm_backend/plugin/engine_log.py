"""Puts what vLLM and this package log into Xinference's log file, and what this package logs on its console.

Xinference gives its processes a file handler. Engine processes only print, and vLLM removes that handler from its
logger when it is imported.
"""

from __future__ import annotations

import contextlib
import logging
import re

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "(EngineCore pid=12) INFO 11-20 09:00:00 " or a part of it: the file's own formatter adds the same.
_PREFIX = re.compile(
    r"(?:\((?P<source>[^()]+) pid=(?P<pid>\d+)\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ (?=\[))?"
)
_UNFINISHED = re.compile(r"(?<!\d)(?!100%)\d+%(?: Completed ?)?\|")  # a progress bar before its end


def include_our_loggers() -> None:
    """Show what this package logs on Xinference's console, which drops loggers that are not named after Xinference."""
    logging.getLogger(__package__.partition(".")[0]).parent = logging.getLogger("xinference")


def include_vllm_logger() -> None:
    """Write what vLLM logs in this process to the file; idempotent. Call it after vLLM is imported."""
    present = _file_handlers("vllm")
    for handler in _file_handlers("xinference"):
        if handler not in present:
            logging.getLogger("vllm").addHandler(handler)


def write(line: str) -> None:
    """Write a line that an engine process printed to the file, if there is one; thread-safe, never raises."""
    with contextlib.suppress(Exception):
        handlers = _file_handlers("xinference")
        line = _ESCAPES.sub("", line)
        if not handlers or _UNFINISHED.search(line):
            return
        prefix = _PREFIX.match(line)
        assert prefix is not None  # it matches the empty string
        source, pid, level = prefix.group("source", "pid", "level")
        text = line[prefix.end() :].rstrip()
        if not text:
            return
        name = f"vllm.{source}" if source else "vllm"
        record = logging.LogRecord(name, getattr(logging, level or "INFO"), "", 0, text, None, None)
        if pid:
            record.process = int(pid)
        for handler in handlers:
            if level is None or record.levelno >= handler.level:  # a traceback that was only printed has no level
                _handle(handler, record)


def _handle(handler: logging.Handler, record: logging.LogRecord) -> None:
    # A handler that cannot write prints a traceback to stderr, which Xinference redirects to this very handler while a
    # model loads: with a full disk that went on for minutes. Holding the lock, we are the handler's only user.
    handler.acquire()
    try:
        handler.handleError = _ignore  # type: ignore[method-assign]
        handler.handle(record)
    finally:
        del handler.handleError
        handler.release()


def _ignore(record: logging.LogRecord) -> None:
    pass


def _file_handlers(name: str) -> list[logging.FileHandler]:
    """The file handlers that a record of the logger ``name`` reaches."""
    found: dict[logging.FileHandler, None] = {}  # in order, each once
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        found.update((handler, None) for handler in logger.handlers if isinstance(handler, logging.FileHandler))
        logger = logger.parent if logger.propagate else None
    return list(found)
