"""What outlives the model process of a replica, kept on disk: how its engines died, and a pause that was asked for.

Callers work in memory. One thread reads and writes the files, so a full, read-only or hanging disk costs a log line
and nothing else. Functions here never raise, and only :func:`read` and :func:`flush` wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

logger = logging.getLogger("xinference.vllm_backend")

KEPT = 20  # deaths that are kept with their details; the earlier ones are only counted
MAX_DETAILS = 200_000  # characters of the details of one death, as JSON
DISK_TIMEOUT = 2.0  # seconds that a caller waits for the disk
MAX_QUEUED = 100  # jobs for the disk: one for each replica, and one for each flush


@dataclass(frozen=True)
class ReplicaLog:
    """What is kept of a replica since it was launched.

    Attributes:
        count: number of deaths.
        last: the last of them, oldest first; each has ``time`` in seconds since the epoch and ``reason``, and
            ``details`` if more is known.
        paused: the pause, as the engine's :class:`.pause.Control` wants it back; None while there is none.
    """

    count: int = 0
    last: tuple[dict[str, Any], ...] = ()
    paused: dict[str, Any] | None = None


class _Replica:
    """The log of one replica, in memory and in its file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._count = 0
        self._last: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._paused: dict[str, Any] | None = None
        self._paused_since_begun = False  # what the file says of it does not count any more
        self._changed = False
        self._begun = time.monotonic()
        self._loaded = threading.Event()

    def log(self) -> ReplicaLog:
        """What is known so far; waits for the file until ``DISK_TIMEOUT`` seconds after it was first asked for."""
        self._loaded.wait(max(0.0, self._begun + DISK_TIMEOUT - time.monotonic()))
        with self._lock:
            return self._log()

    def _log(self) -> ReplicaLog:
        return ReplicaLog(self._count, tuple(self._last), self._paused)

    def add(self, death: dict[str, Any]) -> None:
        with self._lock:
            self._last.append(death)
            self._count += 1
            self._changed = True

    def replace_last(self, reason: str) -> None:
        with self._lock:
            if self._last:
                self._last[-1] = {**self._last[-1], "reason": reason}
                self._changed = True

    def set_paused(self, paused: dict[str, Any] | None) -> None:
        with self._lock:
            self._paused, self._paused_since_begun = paused, True
            self._changed = True

    def clear(self) -> None:
        with self._lock:
            self._last.clear()
            self._count, self._paused = 0, None
            self._changed = True
            self._loaded.set()  # what the file says does not count any more

    def sync(self) -> None:
        """Read the file, once, and write it if anything changed; on the disk's thread."""
        if not self._loaded.is_set():
            with _logged("read"):
                self._merge(_read(self._path))
            self._loaded.set()
        with self._lock:
            changed, self._changed = self._changed, False
            log = self._log()
        if changed:
            with _logged("written"):
                _write(self._path, log)

    def _merge(self, earlier: ReplicaLog) -> None:
        with self._lock:
            if not self._loaded.is_set():  # else it was cleared meanwhile
                self._count += earlier.count
                self._last = deque((*earlier.last, *self._last), maxlen=KEPT)
                if not self._paused_since_begun:
                    self._paused = earlier.paused


class _Disk:
    """The thread that reads and writes the files, in the order it is asked to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.Queue[_Replica | threading.Event] = queue.Queue(MAX_QUEUED)
        self._queued: set[_Replica | threading.Event] = set()
        self._thread: threading.Thread | None = None

    def put(self, job: _Replica | threading.Event) -> None:
        """Have ``job`` done: a replica's file brought up to date, or an event set when all before it is done."""
        with self._lock:
            if job in self._queued:  # it will find what is new
                return
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads
                self._thread = threading.Thread(target=self._run, name="xinf-vllm-replica-log", daemon=True)
                self._thread.start()
            try:
                self._jobs.put_nowait(job)
                self._queued.add(job)
            except queue.Full:
                logger.warning("The disk hangs: deaths and pauses of vLLM engines are kept in memory alone.")

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            with self._lock:
                self._queued.discard(job)
            if isinstance(job, threading.Event):
                job.set()
            else:
                job.sync()


_lock = threading.Lock()
_replicas: dict[str, _Replica] = {}
_disk = _Disk()


def begin(replica_uid: str) -> None:
    """Forget what an earlier worker left of ``replica_uid``; called in the worker, which makes the instances."""
    with _lock:
        is_known = replica_uid in _replicas
    if not is_known:
        forget(replica_uid)


def go_on(replica_uid: str) -> None:
    """Go on with the log that another process of ``replica_uid`` has begun; called before :func:`begin`."""
    _replica(replica_uid)


def record(replica_uid: str, reason: str, details: Mapping[str, Any] | None = None) -> None:
    """Add a death, now, to those of ``replica_uid``.

    Args:
        replica_uid: of the engine.
        reason: a sentence.
        details: what is known of a hang, as plain data: ``stacks``, a list of ``{pid, title, text}``, and
            ``requests``, a list of ``{id, prompt_tokens, given_tokens}``. It is cut to ``MAX_DETAILS``.
    """
    replica = _replica(replica_uid)
    replica.add(_described(reason, details))
    _disk.put(replica)


def record_from_outside(replica_uid: str, reason: str, details: Mapping[str, Any] | None = None) -> None:
    """As :func:`record`, from another process, once the one that has the deaths in memory records no more."""
    replica = _Replica(_path(replica_uid))  # reads the file again
    replica.add(_described(reason, details))
    _disk.put(replica)


def _described(reason: str, details: Mapping[str, Any] | None) -> dict[str, Any]:
    death: dict[str, Any] = {"time": time.time(), "reason": reason}
    if details is not None:
        with _logged("described"):
            death["details"] = _cut(details)
    return death


def amend(replica_uid: str, reason: str) -> None:
    """Give the last death of ``replica_uid`` another reason: it was found to be more than that."""
    replica = _replica(replica_uid)
    replica.replace_last(reason)
    _disk.put(replica)


def record_pause(replica_uid: str, paused: Mapping[str, Any] | None) -> None:
    """Keep that ``replica_uid`` is paused, or with None that it is no more.

    Args:
        replica_uid: of the engine.
        paused: as JSON can hold it.
    """
    replica = _replica(replica_uid)
    replica.set_paused(None if paused is None else dict(paused))
    _disk.put(replica)


def read(replica_uid: str) -> ReplicaLog:
    """What is kept of ``replica_uid`` since it was launched.

    In a new process it waits for the disk, ``DISK_TIMEOUT`` seconds at most; so never call it on an event loop.
    """
    return _replica(replica_uid).log()


def summary(log: ReplicaLog) -> dict[str, Any]:
    """The deaths in ``log`` as ``GET /v1/models/{uid}/engine`` shows them.

    Returns:
        ``deaths``, their number; ``last_error``, ``{time, reason}`` of the last one; ``last_hang``, ``{time, reason,
        stacks, requests}`` of the last one that has details. Either is None where there is none.
    """
    hangs = [death for death in log.last if "details" in death]
    return {
        "deaths": log.count,
        "last_error": _bare(log.last[-1]) if log.last else None,
        "last_hang": {**_bare(hangs[-1]), **hangs[-1]["details"]} if hangs else None,
    }


def _bare(death: Mapping[str, Any]) -> dict[str, Any]:
    return {name: death[name] for name in ("time", "reason")}


def forget(replica_uid: str) -> None:
    """Drop the log of a replica that is stopped on purpose."""
    replica = _replica(replica_uid)
    replica.clear()
    _disk.put(replica)


def flush(timeout: float = DISK_TIMEOUT) -> bool:
    """Wait until the disk has what was recorded, ``timeout`` seconds at most; so never call it on an event loop.

    Returns:
        Whether it has.
    """
    done = threading.Event()
    _disk.put(done)
    return done.wait(timeout)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an engine must not fail for want of its log
        logger.warning("The log of a replica could not be %s: %r", what, error)


def _replica(uid: str) -> _Replica:
    with _lock:
        if uid not in _replicas:
            _replicas[uid] = _Replica(_path(uid))
            _disk.put(_replicas[uid])
        return _replicas[uid]


def _path(uid: str) -> Path:
    from xinference.constants import XINFERENCE_HOME

    return Path(XINFERENCE_HOME, "vllm_backend", "replicas", quote(uid, safe="") + ".json")


def _read(path: Path) -> ReplicaLog:
    try:
        found = json.loads(path.read_text())
        return ReplicaLog(int(found["count"]), tuple(found["last"])[-KEPT:], found.get("paused"))
    except FileNotFoundError:
        return ReplicaLog()


def _write(path: Path, log: ReplicaLog) -> None:
    if log == ReplicaLog():
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # never half a file, of a process killed while it wrote
    try:
        temporary.write_text(json.dumps(vars(log)))
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _cut(details: Mapping[str, Any]) -> dict[str, Any]:
    """``details`` with the ends of its texts, and its last entries, left out until they fit."""
    room = MAX_DETAILS
    while room:
        cut = _with_room(details, room)
        if len(json.dumps(cut)) <= MAX_DETAILS:
            return cut
        room //= 2
    return {"stacks": [], "requests": []}


def _with_room(details: Mapping[str, Any], room: int) -> dict[str, Any]:
    stacks: list[Mapping[str, Any]] = list(details.get("stacks", ()))[: 1 + room // 1000]
    return {
        "stacks": [_stack(stack, room // len(stacks)) for stack in stacks],
        "requests": [_request(request) for request in _first(details.get("requests", ()), room // 500)],
    }


def _stack(stack: Mapping[str, Any], room: int) -> dict[str, Any]:
    return {"pid": int(stack["pid"]), "title": str(stack["title"])[:200], "text": str(stack["text"])[:room]}


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(request["id"])[:200],
        "prompt_tokens": request["prompt_tokens"],
        "given_tokens": request["given_tokens"],
    }


def _first(items: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    return list(items)[:count]
