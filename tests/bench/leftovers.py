"""What faults leave behind: processes, files and names in shared memory, of which nothing may be left after 5 s."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

BOUND = 5.0  # seconds within which nothing may be left
LATE = 30.0  # seconds that are waited for what was not gone by then, to tell late from never
POLL = 0.03  # seconds
SHARED_MEMORY = Path("/dev/shm")
NOBODY = "nobody"


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        victim: what was killed.
        phase: what the engine was doing then; "" of a host.
        said: what became of the engine, or of the launches.
        seconds: until nothing was left.
        faults: what should not be; empty is clean.
    """

    victim: str = NOBODY
    phase: str = ""
    said: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """The names in shared memory, and the paths in a temporary directory."""

    shared_memory: frozenset[str]
    temporary: frozenset[str]


class Leaver(Protocol):
    """What leaves something behind."""

    def left(self, before: Files, alive: bool) -> list[str]: ...


def files(temporary: Path) -> Files:
    """What there is in shared memory and in the directory ``temporary``."""
    paths = (
        os.path.relpath(os.path.join(directory, name), temporary)
        for directory, directories, names in os.walk(temporary)
        for name in (*directories, *names)
        if "torchinductor_" not in os.path.join(directory, name)  # torch's cache is meant to stay
    )
    return Files(frozenset(os.listdir(SHARED_MEMORY)), frozenset(paths))


def new_files(before: Files, now: Files, ours: set[int]) -> list[str]:
    """Those that there were not before, but for shared memory that processes use which are not ``ours``."""
    new = now.shared_memory - before.shared_memory
    found = [str(SHARED_MEMORY / name) for name in sorted(new - _used_by_others(new, ours))]
    return found + [f"$TMPDIR/{path}" for path in sorted(now.temporary - before.temporary)]


def _used_by_others(names: frozenset[str], ours: set[int]) -> set[str]:
    """Those ``names`` in shared memory that processes use which are not ``ours``: others run engines here as well."""
    used: set[str] = set()
    for pid in psutil.pids() if names else []:
        if pid not in ours:
            with contextlib.suppress(OSError):
                used |= names & set(Path(f"/proc/{pid}/maps").read_text().replace("/", " ").split())
    return used


def inductor_cache() -> str:
    """Where torch caches for all: outside of the directories that are removed."""
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(default)


def until_clean(outcome: Outcome, leaver: Leaver, before: Files, since: float, alive: bool) -> None:
    """Wait until nothing is left, and say what was left for too long."""
    late: list[str] = []
    clean: float | None = None
    while (now := time.monotonic() - since) < LATE:
        found = leaver.left(before, alive)
        if not found and clean is not None:  # twice in a row: a process may appear behind the back of one look
            break
        clean = None if found else now
        if now > BOUND:
            late = late or found
        time.sleep(POLL)
    outcome.seconds = LATE if clean is None else clean
    if outcome.seconds > BOUND:
        how = "left for good" if clean is None else f"left for {clean:.1f} s"
        outcome.faults += [f"{how}: {what}" for what in late] or [how]


def table(victims: Collection[str], phases: Collection[str], faults: Collection[tuple[str, str]]) -> str:
    """How many ``faults``, each a victim and a phase, as Markdown."""
    lines = ["| victim | " + " | ".join(phases) + " | all |", "|--" * (len(phases) + 2) + "|"]
    for victim in victims:
        of_it = [phase for hit, phase in faults if hit == victim]
        counts = [of_it.count(phase) or "" for phase in phases]
        lines.append(f"| {victim} | " + " | ".join(map(str, counts)) + f" | {len(of_it)} |")
    return "\n".join(lines)
