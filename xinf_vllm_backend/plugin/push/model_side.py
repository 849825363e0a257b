"""Streams leave the model process by a link.

One actor call lasts as long as its stream. It calls the model actor's own chat or generate, and asks for the items as
the API would: so Xinference's admission, limits, metrics and abort work as ever. The chunks go by the link, and the
actor's items are two: that there is a first chunk, and in the end the usage or the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import random
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ...engine import client, replay
from ...engine.replay import Record
from ...engine.seams import core_client, replaying
from ...engine.seams.seam import Seam
from ...process import link
from ...process.link import LinkLostError, Outlet, Sender
from .. import push
from . import AGAIN, PROGRESS, PUSH, RELINK, NotBegunError, OtherProcessError, ids

logger = logging.getLogger("xinference.vllm_backend")

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

ACTOR = Seam(
    "xinference.core.model",
    "ModelActor",
    "pushing streams to the API",
    "the API pulls each item by an actor call",
    members=("chat", "generate", "decrease_serve_count", "__xoscar_next__", "__xoscar_destroy_generator__"),
)
ITERATOR = Seam("xoscar.api", "IteratorWrapper", ACTOR.used_for, ACTOR.without, members=("_uid", "_gc_destroy"))
SEAMS = (ACTOR, ITERATOR)

_pump: ContextVar[_Pump | None] = ContextVar("xinf_vllm_pump", default=None)  # of the actor call


def why_pulled() -> str | None:
    """Why no stream leaves this process by a link; None if they may."""
    return push.why_pulled(SEAMS)


def why_not_failed_over() -> str | None:
    """Why no request outlives this process; None if those whose streams are pushed do."""
    return push.why_not_failed_over((*replaying.SEAMS, core_client.OUTPUTS_QUEUE))


def install_in_model_process() -> None:
    """Give the model actor the methods that an API process calls; idempotent."""
    if all(seam.present() for seam in SEAMS):
        actor = ACTOR.owner().ModelActor
        setattr(actor, PUSH, _push)
        setattr(actor, AGAIN, _push_again)


def pushed(fn: F) -> F:
    """Wrap a coroutine method of a model, whose stream goes by a link if the actor call says so."""

    @functools.wraps(fn)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        pump = _pump.get()
        _pump.set(None)  # a method that this one calls does not push
        with contextlib.nullcontext() if pump is None else pump.making():
            result = await fn(*args, **kwargs)
        return pump.stand_in_for(result) if pump is not None and hasattr(result, "__aiter__") else result

    return wrapped  # type: ignore[return-value]


async def _push(
    actor: Any,
    method: str,
    name: str,
    key: int,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    asked: dict[str, Any] | None = None,
) -> Any:
    """Call ``method`` of ``actor``, and write its stream to the link ``name``.

    Args:
        asked: of a stream that may go on in another process: the ``seed`` of its ids, and if it has begun in another,
            the ``notes`` and the number of ``chunks`` that the reader has; ``patience``, in seconds, if it can go on in
            another when the engine here is away for longer.

    Returns:
        what ``method`` returned if that is no stream; None when all of the stream has arrived.

    Raises:
        NotBegunError: there is no such link.
        LinkLostError: it was lost, and there was no other in time.
        Exception: what ``method`` or its stream raised; all chunks before have arrived.
    """
    with _patient((asked or {}).get("patience")), actor.push_links.open(name, key, asked) as pump:
        iterator = await _called(pump, actor, getattr(actor, method), args, kwargs)
        if not pump.has_stream:
            return iterator
        pump.put(b"")  # it is admitted
        try:
            await _read(actor, iterator._uid)
        except Exception:
            with contextlib.suppress(LinkLostError):
                await pump.flush()
            raise
        await pump.finish()


@contextlib.contextmanager
def _patient(seconds: float | None) -> Iterator[None]:
    """Have requests of this context wait no longer than ``seconds`` for an engine."""
    token = client.patience.set(seconds)
    try:
        yield
    finally:
        client.patience.reset(token)


async def _called(pump: _Pump, actor: Any, method: Callable[..., Awaitable[Any]], args: Any, kwargs: Any) -> Any:
    """What ``method`` returns, called in a task of its own: an abort by id may cancel it, as long as it lasts."""
    token = _pump.set(pump)
    try:
        calling = asyncio.ensure_future(method(*args, **kwargs))
    finally:
        _pump.reset(token)
    try:
        result = await calling
    except asyncio.CancelledError:
        await asyncio.wait({calling}, timeout=RELINK)
        if pump.has_stream and _has_returned(calling):  # just now, and nobody will read from it
            calling.result()._gc_destroy = False
            await _release(actor, calling.result()._uid)
        raise
    if pump.has_stream:
        result._gc_destroy = False  # else by a thread, for which the event loop waits
    return result


def _has_returned(call: asyncio.Future[Any]) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


async def _release(actor: Any, uid: str) -> None:
    """Close the iterator ``uid``, and release the slot of its request."""
    await actor.__xoscar_destroy_generator__(uid)
    await actor.decrease_serve_count()


async def _read(actor: Any, uid: str) -> None:
    """Ask for the items of the iterator ``uid`` until it ends, and release the request's slot."""
    try:
        while True:
            await actor.__xoscar_next__(uid)
    except Exception as error:
        if "StopIteration" not in str(error):  # what xoscar raises at the end
            raise
    finally:
        await _release(actor, uid)


async def _push_again(actor: Any, first: tuple[str, int], name: str, key: int, received: int) -> None:
    """Go on with the stream that began as ``first`` by the link ``name``, behind the ``received`` items.

    Raises:
        LinkLostError: there is no such stream, or no such link.
    """
    actor.push_links.again(first, name, key, received)


@dataclass
class Notebook:
    """What lets a stream go on in another process.

    Attributes:
        record: what its reader was given.
        seed: of the ids in its chunks.
        had: number of its chunks that the reader has, from another process.
    """

    record: Record
    seed: str
    had: int

    @functools.cached_property
    def ids(self) -> random.Random:
        """What the ids in its chunks are drawn from."""
        return random.Random(self.seed)


class Links:
    """The links of a model process, one for each API process that asked, and the streams on them.

    Attributes:
        fingerprint: of the configuration of the model; set before the first link is offered.
    """

    def __init__(self) -> None:
        self.fingerprint = ""
        self._links: dict[str, Sender] = {}
        self._past: set[str] = set()  # names of all that there were
        self._pumps: dict[tuple[str, int], _Pump] = {}

    def status(self) -> dict[str, int]:
        """How many links there are, and streams."""
        return {"links": len(self._links), "streams": len(self._pumps)}

    async def offer(self, host: str) -> dict[str, Any]:
        """Where an API process can make a link, and under which ``id`` it is known then; see :class:`.link.Offer`."""
        name = uuid.uuid4().hex

        def made(sender: Sender) -> None:
            self._links[name] = sender
            self._past.add(name)

        def ended(sender: Sender) -> None:
            if self._links.pop(name, None) is not None:
                logger.info("A push link has ended: %s", sender.lost)

        return {"id": name, **asdict(await link.offer(host, made, ended))}

    @contextlib.contextmanager
    def open(self, name: str, key: int, asked: dict[str, Any] | None = None) -> Iterator[_Pump]:
        """A pump for the stream ``key`` of the link ``name``.

        Args:
            asked: see :func:`_push`.

        Raises:
            NotBegunError: there is no such link.
        """
        try:
            outlet = self._outlet(name, key)
        except LinkLostError as error:
            raise (NotBegunError if name in self._past else OtherProcessError)(str(error)) from None
        pump = self._pumps[name, key] = _Pump(outlet, self._notebook(asked))
        try:
            yield pump
        finally:
            del self._pumps[name, key]
            pump.close()

    def _notebook(self, asked: dict[str, Any] | None) -> Notebook | None:
        """None for a stream that ends with its process."""
        if asked is None:
            return None
        record = Record(self.fingerprint, asked.get("notes", b""))
        return Notebook(record, asked["seed"], asked.get("chunks", 0))

    def again(self, first: tuple[str, int], name: str, key: int, received: int) -> None:
        """See :func:`_push_again`."""
        pump = self._pumps.get((first[0], first[1]))
        if pump is None:
            raise LinkLostError("The stream has ended meanwhile.")
        pump.go_on(self._outlet(name, key), received)

    def _outlet(self, name: str, key: int) -> Outlet:
        if name not in self._links:
            raise LinkLostError(f"There is no push link {name} any more.")
        return self._links[name].open(key)


class _Pump:
    """Writes the chunks of a stream to its link, and to the next one if that is lost."""

    def __init__(self, outlet: Outlet, notebook: Notebook | None = None) -> None:
        self._outlet = outlet
        self._notebook = notebook
        self._unread: deque[tuple[bytes, bytes, bool]] = deque()  # data, note, whether the last: not acknowledged
        self._read = 0  # items before these
        self._before = 0  # items before the first on this link
        self._relinked = asyncio.Event()
        self.has_stream = False
        if notebook is not None:
            notebook.record.on_progress = self._tell_progress

    def _tell_progress(self) -> None:
        self.put(b"", PROGRESS)

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """While the code runs that makes the stream: have it noted, and its ids drawn again as in another process."""
        with contextlib.ExitStack() as stack:
            if self._notebook is not None:
                stack.enter_context(replay.recording(self._notebook.record))
                stack.enter_context(ids.drawn_from(self._notebook.ids))
            yield

    def stand_in_for(self, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """What the model actor reads in place of ``stream``."""
        self.has_stream = True
        return self._items(stream)

    async def _items(self, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """An item when the first chunk is written, and one with the usage when all are."""
        begun = asyncio.get_running_loop().create_future()
        pumping = asyncio.ensure_future(self._run(stream, begun))
        try:
            if await begun:
                yield {}
            last = await pumping
            if last is not None:
                yield {"usage": last.get("usage")}
        finally:
            pumping.cancel()
            await asyncio.wait({pumping})

    async def _run(self, stream: AsyncIterator[Any], begun: asyncio.Future[bool]) -> Any:
        """Write all chunks, as long as they are read; the last one."""
        chunk = None
        try:
            with self.making():
                async for chunk in stream:
                    if self._outlet.abandoned:
                        break
                    if self._is_had():
                        continue
                    self.put(_event(chunk), self._notes())
                    if not begun.done():
                        begun.set_result(True)
                    await self._through(Outlet.ready)
        finally:
            if not begun.done():
                begun.set_result(False)
            if hasattr(stream, "aclose"):
                await stream.aclose()
        return chunk

    def _is_had(self) -> bool:
        """Whether the reader has this chunk from another process."""
        if self._notebook is None or self._notebook.had == 0:
            return False
        self._notebook.had -= 1
        return True

    def _notes(self) -> bytes:
        return b"" if self._notebook is None else self._notebook.record.take()

    def put(self, data: bytes, note: bytes = b"", last: bool = False) -> None:
        self._unread.append((data, note, last))
        self._outlet.put(data, note, last)
        self._forget_read(self._before + self._outlet.acknowledged)

    def _forget_read(self, count: int) -> None:
        while self._read < count:
            self._unread.popleft()
            self._read += 1

    async def finish(self) -> None:
        """Write that this was all, and see :meth:`flush`."""
        self.put(b"", last=True)
        await self.flush()

    async def flush(self) -> None:
        """Wait until all has arrived, or nobody reads it any more.

        Raises:
            LinkLostError: the link is lost, and there was no other in time.
        """
        await self._through(Outlet.finish)

    async def _through(self, step: Callable[[Outlet], Awaitable[None]]) -> None:
        """Do ``step`` with the stream on its link; if that is lost, with the one on the next."""
        outlet = None
        while outlet is not self._outlet:
            outlet = self._outlet
            try:
                await step(outlet)
            except LinkLostError:
                await self._other_than(outlet)

    async def _other_than(self, outlet: Outlet) -> None:
        """Wait for another link; raises LinkLostError if there is none in time."""
        self._relinked.clear()
        if self._outlet is outlet:
            try:
                await asyncio.wait_for(self._relinked.wait(), RELINK)
            except asyncio.TimeoutError:
                raise LinkLostError(f"The link was lost, and no other was made in {RELINK:g} s.") from None

    def go_on(self, outlet: Outlet, received: int) -> None:
        """Write by ``outlet`` from now on, and again what is behind the ``received`` items."""
        self._forget_read(received)
        self._outlet.close()
        self._outlet, self._before = outlet, received
        for data, note, last in self._unread:
            outlet.put(data, note, last)
        self._relinked.set()

    def close(self) -> None:
        self._outlet.close()


def _event(chunk: Any) -> bytes:
    """``chunk`` as Xinference's model actor writes it: a server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
