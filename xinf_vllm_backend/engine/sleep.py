"""One sleep of an engine, from the order until it is awake again."""

from __future__ import annotations

import asyncio

from ..errors import BackendError


class Sleep:
    """What those that order it, wait for it and end it share; all of it belongs to one event loop.

    Args:
        level: of vLLM's sleep; None: the engine's processes end.
        reason: a sentence.
        is_idle: whether a request wakes it.

    Attributes:
        woken: set when it is to end.
        is_waking: whether it is ending.
    """

    def __init__(self, level: int | None, reason: str, is_idle: bool) -> None:
        self.level = level
        self.reason = reason
        self.is_idle = is_idle
        self.woken = asyncio.Event()
        self.is_waking = False
        self._asleep = asyncio.get_running_loop().create_future()
        self._awake = asyncio.get_running_loop().create_future()

    def has_begun(self) -> None:
        self._asleep.set_result(None)

    async def asleep(self) -> None:
        """Return when it has begun."""
        await asyncio.shield(self._asleep)

    async def until_woken(self, timeout: float) -> None:
        """Return when it is to end, or after ``timeout`` seconds."""
        woken = asyncio.ensure_future(self.woken.wait())
        await asyncio.wait({woken}, timeout=timeout)
        woken.cancel()

    def end(self, error: BackendError | None) -> None:
        """The engine is awake, or will never be."""
        for future in (self._asleep, self._awake):
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
                    future.exception()  # nobody may have waited

    async def awake(self) -> None:
        """Return when it has ended.

        Raises:
            BackendError: the engine could not be woken.
        """
        await asyncio.shield(self._awake)
