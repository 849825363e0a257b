"""From exceptions, exit codes and output to the one sentence that a person needs."""

from __future__ import annotations

import re
import signal
import textwrap
from collections.abc import Iterable, Sequence

import psutil

# "(EngineCore pid=12) ERROR 11-20 09:00:00 [core.py:1275] " and parts of it, as vLLM prefixes its children's lines.
_PREFIX = re.compile(
    r"^(?:\x1b\[[0-9;]*m)*(?:\((?P<source>[^()]* pid=\d+)\)(?:\x1b\[[0-9;]*m)*\s?)?"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d:. -]+\[[^\]]+\]\s?)?"
)
_RAISED = re.compile(
    r"^(?P<type>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Warning)|Exception): (?P<text>.+)$"
)
_SAME_CHAIN = re.compile(r"^(The above exception was the direct cause|During handling of the above exception)")
# Said by a process about another one's failure, or by one that is told to go.
_SECOND_HAND = (
    "see root cause above",
    "see stack trace",
    "engine core initialization failed",
    "background process",
    "cancelled",
    "encountered an issue",
    "connection closed by peer",
)
# Causes whose own words do not say what to do.
_ADVICE = {
    re.compile(r"SafetensorError|PytorchStreamReader|invalid load key"): "a weight file is damaged; fetch it again",
    re.compile(r"OutOfMemoryError|out of memory", re.IGNORECASE): "lower gpu_memory_utilization or max_model_len",
}
MAX_LENGTH = 600  # characters of a cause: some list all they know
_PYDANTIC_NOISE = re.compile(r"^(?:Value error|Assertion failed), ")


def root_cause(lines: Iterable[str]) -> str | None:
    """Find in the output of a tree of processes the exception that brought it down.

    Args:
        lines: output lines, oldest first, of one or several processes.

    Returns:
        ``"ValueError: ..."``, the last exception of the first chain that speaks of its own failure, or None.
    """
    found: str | None = None
    found_in: str | None = None
    chained = False
    for line in lines:
        prefix = _PREFIX.match(line)
        source = prefix.group("source") if prefix else None
        text = line[prefix.end() :] if prefix else line
        if _SAME_CHAIN.match(text):
            chained = source == found_in
            continue
        raised = _RAISED.match(text)
        if raised is None or any(word in raised["text"].lower() for word in _SECOND_HAND):
            continue
        if found is None or (chained and source == found_in):
            found, found_in, chained = _sentence(raised["type"].rpartition(".")[2], raised["text"]), source, False
    return found


def describe(error: BaseException) -> str:
    """``error`` as one line: its type and text; pydantic's errors without their boilerplate."""
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):
        return _shortened(
            "; ".join(
                ".".join(map(str, item["loc"])) + (": " if item["loc"] else "") + _PYDANTIC_NOISE.sub("", item["msg"])
                for item in errors()
            )
        )
    text = " ".join(str(error).split())
    return _sentence(type(error).__name__, text) if text else type(error).__name__


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


def last_words(lines: Sequence[str]) -> str | None:
    """The last line that says something, without vLLM's prefix; None when nothing was printed."""
    return next((text for line in reversed(lines) if (text := _PREFIX.sub("", line).strip())), None)


def _sentence(kind: str, text: str) -> str:
    sentence = _shortened(f"{kind}: {text}")
    advice = next((advice for pattern, advice in _ADVICE.items() if pattern.search(sentence)), None)
    return f"{sentence} ({advice})" if advice else sentence


def _shortened(text: str) -> str:
    return textwrap.shorten(text, MAX_LENGTH, placeholder=" ...")


def _memory_is_short() -> bool:
    memory = psutil.virtual_memory()
    return memory.available < memory.total * 0.1
