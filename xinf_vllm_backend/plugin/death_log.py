"""How the engines of a replica died, kept on disk: the process that saw it is gone when somebody asks."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

_launched: set[str] = set()


def begin(replica_uid: str) -> None:
    """Called where instances are made, in the worker: what an earlier worker left of ``replica_uid`` is forgotten."""
    if replica_uid not in _launched:
        _launched.add(replica_uid)
        forget(replica_uid)


def record(replica_uid: str, reason: str) -> None:
    """Add a death, now, to those of ``replica_uid``."""
    path = _path(replica_uid)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time(), "reason": reason}) + "\n")


def read(replica_uid: str) -> list[dict[str, Any]]:
    """The deaths since the replica was launched, oldest first: ``time`` in seconds since the epoch, ``reason``."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in _path(replica_uid).read_text().splitlines():
            with contextlib.suppress(ValueError):  # half a line, of a process killed while it wrote
                found.append(json.loads(line))
    return found


def forget(replica_uid: str) -> None:
    """Drop the deaths of a replica that was stopped on purpose."""
    _path(replica_uid).unlink(missing_ok=True)


def _path(replica_uid: str) -> Path:
    from xinference.constants import XINFERENCE_HOME

    return Path(XINFERENCE_HOME, "vllm_backend", "deaths", quote(replica_uid, safe="") + ".jsonl")
