"""The requests in flight: what each asked for, and the tokens that it has been given.

An entry lives from the moment a request is handed to the engine until its last output, its abort or its failure, so
that the journal is as large as what is in flight.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Tokens after which a death is no longer held against a request that also saw the last one: what kills an engine each
# time does so where it did before, give or take the steps whose outputs were lost with it.
PROGRESS_TOKENS = 4


@dataclass(eq=False)
class Entry:
    """One request; of ``n`` > 1 each child is one.

    Attributes:
        request: a ``vllm.v1.engine.EngineCoreRequest``, as AsyncLLM made it.
        since: seconds, by the journal's clock, since when it waits for an engine; None while one works on it.
        tokens: ids of those it was given.
        deaths: of engines that worked on it, one soon after the other (see ``PROGRESS_TOKENS``).
        suspect: whether, at the last of them, it alone had not got further since it was sent.
        further: set once it got further since it was sent, or ended.
        goal: number of tokens at which it has got further; more than there can be once it has.
    """

    request: Any
    since: float | None
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0
    suspect: bool = False
    further: asyncio.Event = field(default_factory=asyncio.Event)
    goal: int = PROGRESS_TOKENS

    @property
    def id(self) -> str:
        return str(self.request.request_id)

    def sent(self) -> None:
        """An engine works on it from now on."""
        self.since = None
        self.further.clear()
        self.goal = len(self.tokens) + PROGRESS_TOKENS

    def reached_goal(self) -> None:
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
        outputs: how many batches were delivered.
        aborts_wanted: whether the engine was told to end its requests, as by a pause.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self.outputs = 0
        self.aborts_wanted = False

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __contains__(self, entry: Entry) -> bool:
        return self._entries.get(entry.id) is entry

    def open(self, request: Any) -> Entry:
        """The entry of ``request``, a new one unless it is a further part of a prompt that is being streamed."""
        return self._entries.setdefault(request.request_id, Entry(request, self._clock()))

    def deliver(self, outputs: Iterable[Any]) -> set[str]:
        """Note ``EngineCoreOutput`` s as delivered, but for those that end a request which nobody asked to abort.

        Returns:
            The ids of these; an engine that is told to end says so of all its requests.
        """
        self.outputs += 1
        aborted = set()
        entries = self._entries
        for output in outputs:  # for every token of every request: nothing here that can be elsewhere
            entry = entries.get(output.request_id)
            if entry is not None:
                if output.finish_reason is not None:
                    if str(output.finish_reason) == "abort" and not self.aborts_wanted:
                        aborted.add(output.request_id)
                        continue
                    self.close((output.request_id,))
                tokens = entry.tokens
                tokens += output.new_token_ids
                if len(tokens) >= entry.goal:
                    entry.reached_goal()
        return aborted

    def close(self, ids: Iterable[str]) -> None:
        """Forget those that ended."""
        for request_id in ids:
            entry = self._entries.pop(request_id, None)
            if entry is not None:
                entry.further.set()

    def lost(self) -> list[Entry]:
        """The engine died: all that it worked on wait again, and are returned."""
        working = [entry for entry in self._entries.values() if entry.since is None]
        stuck = {entry.request.external_req_id for entry in working if not entry.further.is_set()}
        for entry in working:
            entry.suspect = stuck == {entry.request.external_req_id}
            entry.lost(self._clock())
        return working

    def waiting(self, longer_than: float = 0.0) -> list[Entry]:
        """Those that wait for an engine, for at least ``longer_than`` seconds."""
        latest = self._clock() - longer_than
        return [entry for entry in self._entries.values() if entry.since is not None and entry.since <= latest]
