"""Streams leave the model process by a link.

The actor call that makes a stream returns two items: the first chunk, and in the end its usage or error. All chunks
between them are written to the link by whoever asks for the second. Xinference's admission, limits, metrics and abort
work on that call as ever.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from ...process import link
from ...process.link import LinkLostError, Outlet, Sender
from . import KEY, MARK, PULLED_FROM, PUSHED

logger = logging.getLogger("xinference.vllm_backend")

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


class Links:
    """The links of a model process, one for each API process that asked."""

    def __init__(self) -> None:
        self._links: dict[str, Sender] = {}

    def status(self) -> dict[str, int]:
        """How many links there are, and streams on them."""
        return {"links": len(self._links), "streams": sum(len(sender) for sender in self._links.values())}

    async def offer(self, host: str) -> dict[str, Any]:
        """Where an API process can make a link, and under which ``id`` it is known then; see :class:`.link.Offer`."""
        name = uuid.uuid4().hex

        def made(sender: Sender) -> None:
            self._links[name] = sender

        def ended(sender: Sender) -> None:
            if self._links.pop(name, None) is not None:
                logger.info("A push link has ended: %s", sender.lost)

        return {"id": name, **asdict(await link.offer(host, made, ended))}

    def open(self, name: str, key: int) -> Outlet | None:
        """The stream ``key`` of the link ``name``; None if that is gone."""
        sender = self._links.get(name)
        with contextlib.suppress(LinkLostError):
            return None if sender is None else sender.open(key)
        return None


def pushed(fn: F) -> F:
    """Wrap a coroutine method of a model, whose streams go by the link that their ``generate_config`` names."""

    @functools.wraps(fn)
    async def wrapped(self: Any, prompt: Any, generate_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not generate_config or KEY not in generate_config:
            return await fn(self, prompt, generate_config, *args, **kwargs)
        generate_config = dict(generate_config)
        open_stream = functools.partial(self.push_links.open, *generate_config.pop(KEY))
        result = await fn(self, prompt, generate_config, *args, **kwargs)
        return _items(result, open_stream) if hasattr(result, "__aiter__") else result

    return wrapped  # type: ignore[return-value]


async def _items(stream: AsyncIterator[Any], open_stream: Callable[[], Outlet | None]) -> AsyncIterator[Any]:
    """The items of the actor call; the link's stream is opened when the first is asked for."""
    async with contextlib.AsyncExitStack() as closing:
        if hasattr(stream, "aclose"):
            closing.push_async_callback(stream.aclose)
        first = await anext(stream, None)
        if first is None:
            return
        outlet = open_stream()
        if outlet is not None:
            closing.callback(outlet.close)
        yield first
        if outlet is None:
            yield {MARK: {PULLED_FROM: 1}}
        else:
            pump = _Pump(outlet)
            try:
                await pump.run(stream)
            except LinkLostError:
                yield {MARK: {PULLED_FROM: pump.arrived + 1}}
                for chunk in pump.unread():
                    yield chunk
            else:
                yield pump.end()
                return
        async for chunk in stream:
            yield chunk


class _Pump:
    """Writes the chunks of a stream to its link."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._unread: deque[Any] = deque()
        self._put = 0
        self._last: Any = {}

    @property
    def arrived(self) -> int:
        """How many chunks the receiver is known to have."""
        return min(self._outlet.acknowledged, self._put)

    def unread(self) -> list[Any]:
        """Those that it may not have."""
        return list(self._unread)[len(self._unread) - (self._put - self.arrived) :]

    def end(self) -> dict[str, Any]:
        return {MARK: {PUSHED: self._put}, "usage": self._last.get("usage")}

    async def run(self, stream: AsyncIterator[Any]) -> None:
        """Write all chunks; returns when they have arrived, or nobody reads them any more.

        Raises:
            LinkLostError: the link is lost.
            Exception: what ``stream`` raised; all chunks before have arrived.
        """
        outlet = self._outlet
        await outlet.ready()
        try:
            async for chunk in stream:
                if outlet.abandoned:
                    return
                self._add(chunk)
                await outlet.ready()
        except LinkLostError:
            raise
        except Exception:
            with contextlib.suppress(LinkLostError):
                await outlet.finish()
            raise
        outlet.put(b"", last=True)
        await outlet.finish()

    def _add(self, chunk: Any) -> None:
        self._last = chunk
        self._unread.append(chunk)
        self._put += 1
        self._outlet.put(_event(chunk))
        while len(self._unread) > self._put - self.arrived:
            self._unread.popleft()


def _event(chunk: Any) -> bytes:
    """``chunk`` as Xinference's model actor writes it: a server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
