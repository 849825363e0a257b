"""Pooling requests that come while the engine works on others go to it together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .journal import Entry, Journal

logger = logging.getLogger(__name__)

AT_ONCE = 2  # batches that the engine has: one that it works on, and the next


class Batches:
    """What is sent to the engine when.

    An engine steps as soon as it has one request, and a step costs about as much for one as for many. A pooling request
    is done in one step, so that what comes meanwhile had better wait and go with the next.

    Args:
        journal: has an entry for each request; one whose ``since`` is None is with the engine.
        send: sends the request of an entry to the engine, if that may be.
    """

    def __init__(self, journal: Journal, send: Callable[[Entry], Awaitable[None]]) -> None:
        self._journal = journal
        self._send = send
        self._waiting: list[Entry] = []
        self._running: list[list[Entry]] = []
        self._beginning: asyncio.Task[None] | None = None

    def add(self, entry: Entry) -> None:
        """Send the request of ``entry`` with the next batch."""
        self._waiting.append(entry)
        self._begin_soon()

    def look(self) -> None:
        """Some requests may have ended: begin the next batch if there is room for it."""
        if self._waiting:
            self._begin_soon()

    def _begin_soon(self) -> None:
        """When all that has come with what the event loop does now is there."""
        if self._beginning is None and self._has_room():
            self._beginning = asyncio.ensure_future(self._begin())
            self._beginning.add_done_callback(self._begun)

    def _has_room(self) -> bool:
        self._running = [batch for batch in self._running if any(map(self._is_with_engine, batch))]
        return len(self._running) < AT_ONCE

    def _is_with_engine(self, entry: Entry) -> bool:
        return entry.since is None and entry in self._journal

    async def _begin(self) -> None:
        batch, self._waiting = [entry for entry in self._waiting if entry.since is not None], []
        for entry in batch:
            await self._send(entry)
        self._running.append(batch)

    def _begun(self, beginning: asyncio.Task[None]) -> None:
        self._beginning = None
        if not beginning.cancelled() and (error := beginning.exception()) is not None:
            logger.error("A batch could not be sent: %r", error)  # its requests end with the engine
        self.look()
