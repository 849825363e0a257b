"""From exceptions, exit codes and output to the one sentence that a person needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# "(EngineCore pid=12) ERROR 11-20 09:00:00 [core.py:1275] " and parts of it, as vLLM prefixes its children's lines.
_PREFIX = re.compile(
    r"^(?:\((?P<source>[^()]* pid=\d+)\)\s?)*"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d:. -]+\[[^\]]+\]\s?)?"
)
_RAISED = re.compile(
    r"^(?P<type>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)|Exception)(?:: (?P<text>.+))?$"
)
_PYDANTIC = re.compile(r"^\d+ validation errors? for ")  # what is wrong stands in the two lines after it
_ENDED = re.compile(r"^\S+ \(pid \d+\) (?:was killed by|exited with status) ")
_KILLED = re.compile(r" was killed by (\w+)")
_ORDINARY = ("SIGKILL", "SIGTERM")  # of what is told to go, and of what the kernel ends when memory runs out
# Said where an accelerator, or what connects several of them, cannot be initialised.
_NOT_INITIALISED = re.compile(
    r"re-initialize \w+ in forked subprocess"
    r"|error: initialization error|ErrorInitializationError|ErrorNotInitialized|_(?:NOT_|UN)INITIALIZED"
    r"|(?:CUDA|HIP|XPU) initialization:|driver initialization failed|driver not initialized|CUDA unknown error"
    r"|NCCL error(?!.*invalid (?:usage|argument))|nccl(?:UnhandledCuda|System|Internal)Error"
)
_OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
_SAME_CHAIN = re.compile(r"^(The above exception was the direct cause|During handling of the above exception)")
# Said by a process about another one's failure, or by one that is told to go.
_SECOND_HAND = (
    "see root cause above",
    "see stack trace",
    "engine core initialization failed",
    "background process",
    "cancelled",
    "encountered an issue",
    "executor failed",
    "connection closed by peer",
)
# Causes whose own words do not say what to do.
_ADVICE = {
    re.compile(r"SafetensorError|PytorchStreamReader|invalid load key"): "a weight file is damaged; fetch it again",
    re.compile(r"ModuleNotFoundError: No module"): "install it into the environment of the model process",
    re.compile(r"OutOfMemoryError|out of memory", re.IGNORECASE): "lower gpu_memory_utilization or max_model_len",
}
MAX_LENGTH = 600  # characters of a cause: some list all they know
_PYDANTIC_NOISE = re.compile(r"^(?:Value error|Assertion failed), | \[type=.*$")


def root_cause(lines: Iterable[str]) -> str | None:
    """Find in the output of a tree of processes the exception that brought it down.

    Args:
        lines: output lines, oldest first, of one or several processes.

    Returns:
        ``"ValueError: ..."``, the last exception of the first chain that speaks of its own failure; else what is said
        of the first process that ended (see :mod:`..process.exits`); else None.
    """
    ended: str | None = None
    found: str | None = None
    found_in: str | None = None
    goes_on: set[str | None] = set()  # sources whose next exception belongs to the chain of the last one
    details = 0
    for source, text in filter(None, map(_split, lines)):
        if found is not None and details and source == found_in:
            found, details = f"{found} {_PYDANTIC_NOISE.sub('', text.strip())}", details - 1
            continue
        if _SAME_CHAIN.match(text):
            goes_on.add(source)
            continue
        if ended is None and _ENDED.match(text):
            ended = text
        raised = _RAISED.match(text)
        if raised is None:
            continue
        if not is_second_hand(text) and (found is None or (source == found_in and source in goes_on)):
            kind, said = raised["type"].rpartition(".")[2], raised["text"] or ""
            found, found_in, details = f"{kind}: {said}" if said else kind, source, 2 * bool(_PYDANTIC.match(said))
        goes_on.discard(source)
    return _advised(found) if found else ended


def is_second_hand(text: str) -> bool:
    """Whether ``text`` is what a process says about the failure of another one."""
    return any(word in text.lower() for word in _SECOND_HAND)


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
    kind, text = type(error).__name__, " ".join(str(error).split())
    return _advised(f"{kind}: {text}" if text else kind)


def may_be_the_fork(cause: str, ended: Iterable[str]) -> bool:
    """Whether a forked engine failed to start in a way in which a spawned one might not.

    Args:
        cause: the root cause.
        ended: how processes of it ended (see :mod:`..process.exits`).
    """
    signals = [killed[1] for killed in map(_KILLED.search, ended) if killed]
    named = _NOT_INITIALISED.search(cause) and not _OUT_OF_MEMORY.search(cause)
    return bool(named) or any(signal not in _ORDINARY for signal in signals)


def last_words(lines: Sequence[str]) -> str | None:
    """The last line that says something, without vLLM's prefix; None when nothing was printed."""
    bare = (_PREFIX.sub("", _COLOUR.sub("", line)).strip() for line in reversed(lines))
    return next(filter(None, bare), None)


def _split(line: str) -> tuple[str | None, str] | None:
    """Source and text of a line; None for what is logged below the level of errors."""
    line = _COLOUR.sub("", line)
    prefix = _PREFIX.match(line)
    assert prefix is not None  # it matches the empty string
    return None if prefix["level"] in ("DEBUG", "INFO", "WARNING") else (prefix["source"], line[prefix.end() :])


def _advised(sentence: str) -> str:
    advice = next((advice for pattern, advice in _ADVICE.items() if pattern.search(sentence)), None)
    return _shortened(sentence) + (f" ({advice})" if advice else "")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 4] + " ..."
