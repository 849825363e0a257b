"""vLLM's lines, and ours, where Xinference's are: in its log file, and ours on its console.

Xinference gives its processes a file handler, but engine processes only print, and vLLM when it is imported takes
that handler off its logger.
"""

from __future__ import annotations

import contextlib
import logging
import re

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "(EngineCore pid=12) INFO 11-20 09:00:00 " or a part of it: all that the file's own formatter says too.
_PREFIX = re.compile(
    r"(?:\((?P<source>[^()]+) pid=(?P<pid>\d+)\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ (?=\[))?"
)
_UNFINISHED = re.compile(r"(?<!\d)(?!100%)\d+%(?: Completed ?)?\|")  # a progress bar, of which the end is enough


def include_our_loggers() -> None:
    """Let what this package logs reach Xinference's console too, which drops what is not named after Xinference."""
    logging.getLogger(__package__.partition(".")[0]).parent = logging.getLogger("xinference")


def include_vllm_logger() -> None:
    """Let what vLLM logs in this process reach the file too; to be called once vLLM is imported, and idempotent."""
    present = _file_handlers("vllm")
    for handler in _file_handlers("xinference"):
        if handler not in present:
            logging.getLogger("vllm").addHandler(handler)


def write(line: str) -> None:
    """Write a line that an engine process printed to the file, if there is one; from any thread, and never raises."""
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
    """Those that a record of the logger ``name`` gets to."""
    found: dict[logging.FileHandler, None] = {}  # in order, each once
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        found.update((handler, None) for handler in logger.handlers if isinstance(handler, logging.FileHandler))
        logger = logger.parent if logger.propagate else None
    return list(found)
