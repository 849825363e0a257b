"""The requests in flight: what each asked for, and the tokens that it was given.

An entry lives from the moment a request is handed to the engine until its last output, its abort or its failure, so
the journal is as large as what is in flight.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

# A request that got this many tokens since it was last sent is not blamed for a death: what kills an engine each time
# does so where it did before, give or take the steps whose outputs were lost with it.
PROGRESS_TOKENS = 4


@dataclass(eq=False)
class Entry:
    """One request; of ``n`` > 1 each child is one.

    Attributes:
        id: vLLM's internal id.
        shown_id: the id by which the client knows it; children of one request share it.
        request: a ``vllm.v1.engine.EngineCoreRequest``, as AsyncLLM made it.
        since: seconds, by the journal's clock, since when it waits for an engine; None while one works on it.
        tokens: ids of those it was given.
        deaths: engines in a row that died while they worked on it, without progress between two deaths.
        further: set once it made progress since it was sent, or ended.
        goal: number of tokens that are progress; more than there can be once it has made some.
        parts: of a prompt that is being streamed, those that were sent and not finished; 0 for any other request.
        streams_input: whether further parts of its prompt may follow.
        replay: a :class:`.replay.Record` of what it was given in another process, while it is fed that; no engine works
            on it yet.
        inexact: why it may not go on as it would have in that process; None where it will.
        patience: seconds that it waits for an engine, where that is less than the others do.
        held: whether it came while the engine was pausing or paused.
    """

    id: str
    shown_id: str
    request: Any
    since: float | None
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0
    further: asyncio.Event = field(default_factory=asyncio.Event)
    goal: int = PROGRESS_TOKENS
    parts: int = 0
    streams_input: bool = False
    replay: Any = None
    inexact: str | None = None
    patience: float = float("inf")
    held: bool = False

    def sent(self) -> None:
        """An engine works on it from now on."""
        self.since = None
        self.further.clear()
        self.goal = len(self.tokens) + PROGRESS_TOKENS

    def made_progress(self) -> None:
        self.goal = sys.maxsize
        self.further.set()

    def lost(self, now: float) -> None:
        """The engine that worked on it died."""
        self.deaths = 1 if self.further.is_set() else self.deaths + 1
        self.since = now


class Journal:
    """All entries, oldest first.

    Args:
        clock: seconds.

    Attributes:
        outputs: number of batches that each rank of the engine delivered.
        aborts_wanted: whether the engine was told to end its requests, as by a pause.
        used: seconds, by the clock, when a request or call last began or ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self.outputs: Counter[int] = Counter()
        self.aborts_wanted = False
        self.used = clock()
        self._closed = asyncio.Event()  # an entry was

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __contains__(self, entry: Entry) -> bool:
        return self._entries.get(entry.id) is entry

    def open(self, request_id: str, shown_id: str, request: Any) -> Entry:
        """The entry of a request: a new one, unless ``request`` is a further part of a prompt that is being streamed.

        Such an entry stays until the part after which no other follows has ended: what the engine knows of the earlier
        parts goes with the engine.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            entry = Entry(request_id, shown_id, request, self._clock())
            self._entries[request_id] = entry
        streams = bool(getattr(request, "resumable", False))
        if streams:
            entry.parts += 1
        elif entry.streams_input and entry.parts == 0:  # its end, after the last part was answered
            self.close((request_id,))
        entry.streams_input = streams
        return entry

    def deliver(self, outputs: Iterable[tuple[str, list[int], str | None]], rank: int = 0) -> set[str]:
        """Note outputs as delivered, but for those that end a request which nobody asked to abort.

        Args:
            outputs: of each its request's id, its new token ids, and the finish reason of a last one.
            rank: of the engine, by which they were made.

        Returns:
            The ids of these; an engine that is told to end says so of all its requests.
        """
        self.outputs[rank] += 1
        aborted = set()
        entries = self._entries
        for request_id, new_tokens, finished in outputs:  # for every token of every request: keep it short
            entry = entries.get(request_id)
            if entry is not None:
                if finished is not None:
                    if finished == "abort" and not self.aborts_wanted:
                        aborted.add(request_id)
                        continue
                    self._finish(entry)
                tokens = entry.tokens
                tokens += new_tokens
                if len(tokens) >= entry.goal:
                    entry.made_progress()
        return aborted

    def _finish(self, entry: Entry) -> None:
        entry.parts = max(0, entry.parts - 1)
        if entry.streams_input or entry.parts:
            entry.made_progress()  # by a part of its prompt
        else:
            self.close((entry.id,))

    def close(self, ids: Iterable[str]) -> None:
        """Forget those that ended."""
        for request_id in ids:
            entry = self._entries.pop(request_id, None)
            if entry is not None:
                entry.further.set()
                self.touch()
                self._closed.set()

    def touch(self) -> None:
        """Something began or ended that is a use of the engine."""
        self.used = self._clock()

    def idle(self) -> float:
        """Seconds since the last use; 0 while a request is in flight."""
        return 0.0 if self._entries else self._clock() - self.used

    async def until_closed(self, entries: Iterable[Entry]) -> None:
        """Return when all ``entries`` are closed."""
        left = list(entries)
        while left := [entry for entry in left if entry in self]:
            self._closed.clear()
            await self._closed.wait()

    def lost(self) -> list[Entry]:
        """The engine died: all that it worked on wait again.

        Returns:
            Those that made no progress since they were sent.
        """
        working = [entry for entry in self._entries.values() if entry.since is None]
        stuck = [entry for entry in working if not entry.further.is_set()]
        for entry in working:
            entry.lost(self._clock())
        return stuck

    def suspend(self) -> None:
        """The engine is ended on purpose: all that it worked on wait for the next one."""
        for entry in self._entries.values():
            if entry.since is None:
                entry.since = self._clock()

    def release(self) -> None:
        """Those that were held, or kept, wait from now on as for any engine."""
        for entry in self._entries.values():
            entry.held = False
            if entry.since is not None:
                entry.since = self._clock()

    def waiting(self, bound: Callable[[Entry], float] = lambda entry: 0.0) -> list[Entry]:
        """Those that wait for an engine, for at least ``bound(entry)`` seconds."""
        now = self._clock()
        waiting = [(entry, now - entry.since) for entry in self._entries.values() if entry.since is not None]
        return [entry for entry, seconds in waiting if seconds >= bound(entry)]
