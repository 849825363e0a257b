"""Streams arrive in the API process by a link.

Xinference's API gets its supervisor from one method. What that returns is wrapped, and so are the models that the
supervisor returns: a streaming chat or generate of ours names a link, and reads from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ...engine.seams.seam import Seam
from ...process import link
from ...process.link import Inlet, Offer, Receiver
from . import KEY, MARK, PULLED_FROM, PUSHED, why_off

logger = logging.getLogger("xinference.vllm_backend")

GET_SUPERVISOR = Seam(
    "xinference.api.restful_api",
    "RESTfulAPI._get_supervisor_ref",
    "pushing streams to the API",
    "the API pulls each item by an actor call",
)
ITERATOR = Seam(
    "xoscar.api",
    "IteratorWrapper",
    GET_SUPERVISOR.used_for,
    GET_SUPERVISOR.without,
    members=("destroy", "__anext__", "_gc_destroy"),
)
RELEASE = Seam("xinference.api.restful_api", "_release_model_stream", GET_SUPERVISOR.used_for, GET_SUPERVISOR.without)
# By which the model process is asked for a link.
METHODS = Seam("xinference.core.model", "ModelActor.__getattr__", GET_SUPERVISOR.used_for, GET_SUPERVISOR.without)
SEAMS = (GET_SUPERVISOR, ITERATOR, RELEASE, METHODS)

ASK = 10.0  # seconds for a model to offer a link, and to end a stream
RETRY = 30.0  # seconds after which a link that could not be made is tried again
DESCRIBED = 1.0  # seconds that the description of a model is kept
_MARKED = b'data: {"' + MARK.encode() + b'"'
# Calls of the supervisor that may change what it says of a model begin with one of these.
_CHANGING = ("launch", "terminate", "cancel", "reload", "update", "add", "remove", "scale")


def install(api: Any) -> None:
    """Have ``api``, Xinference's, read the streams of our models from links."""
    reason = why_pulled()
    if reason is not None:
        logger.warning("Streams are pulled item by item, not pushed: %s", reason)
        return
    original = api._get_supervisor_ref
    links = Links()
    described: dict[str, tuple[float, Any]] = {}

    @functools.wraps(original)
    async def get_supervisor_ref() -> Any:
        return Supervisor(await original(), links, described)

    api._get_supervisor_ref = get_supervisor_ref


def why_pulled() -> str | None:
    """Why an API process of this host would read no stream from a link; None if it would."""
    gone = [seam.name for seam in SEAMS if not seam.present()]
    if gone:
        return f"there is no {', '.join(gone)}"
    return why_off()


class Supervisor:
    """The reference of Xinference's supervisor, whose models push."""

    def __init__(self, ref: Any, links: Links, described: dict[str, tuple[float, Any]]) -> None:
        self._ref = ref
        self._links = links
        self._described = described

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_CHANGING):
            self._described.clear()
        return getattr(self._ref, name)

    async def get_model(self, *args: Any, **kwargs: Any) -> Any:
        return Model(await self._ref.get_model(*args, **kwargs), self._links)

    async def describe_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        until, description = self._described.get(model_uid, (0.0, None))
        if time.monotonic() >= until:
            description = await self._ref.describe_model(model_uid, *args, **kwargs)
            self._described[model_uid] = time.monotonic() + DESCRIBED, description
        return description


class Model:
    """The reference of a model, whose streams are read from a link if it has one."""

    def __init__(self, ref: Any, links: Links) -> None:
        self._ref = ref
        self._links = links

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ref, name)

    async def is_vllm_backend(self) -> bool:
        return await self._links.is_vllm(self._ref)

    async def chat(self, *args: Any, **kwargs: Any) -> Any:
        return await self._links.call(self._ref, self._ref.chat, args, kwargs)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        return await self._links.call(self._ref, self._ref.generate, args, kwargs)


class _Peer:
    """What this process knows of a model process."""

    def __init__(self) -> None:
        self.making = asyncio.Lock()
        self.name = ""
        self.link: Receiver | None = None
        self.not_before = 0.0

    def current(self) -> Receiver | None:
        return self.link if self.link is not None and self.link.lost is None else None

    def is_of_use(self) -> bool:
        return self.current() is not None or self.making.locked() or time.monotonic() < self.not_before


class Links:
    """The links of an API process, one for each model process."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, bytes], _Peer] = {}

    async def is_vllm(self, ref: Any) -> bool:
        peer = self._peers.get((ref.address, ref.uid))
        if peer is not None and peer.current() is not None:  # else another process may have the address
            return True
        if not await ref.is_vllm_backend():
            return False
        self._peers.setdefault((ref.address, ref.uid), _Peer())
        return True

    async def call(self, ref: Any, method: Callable[..., Awaitable[Any]], args: Any, kwargs: Any) -> Any:
        """Call ``method`` with arguments that have it push the stream, if it is one."""
        config = args[1] if len(args) > 1 else kwargs.get("generate_config")
        if not isinstance(config, dict) or not config.get("stream"):
            return await method(*args, **kwargs)
        peer = await self._linked(ref)
        if peer is None or (current := peer.current()) is None:
            return await method(*args, **kwargs)
        inlet = current.open()
        config = {**config, KEY: (peer.name, inlet.key)}
        if len(args) > 1:
            args = (args[0], config, *args[2:])
        else:
            kwargs = {**kwargs, "generate_config": config}
        result = None
        try:
            result = await method(*args, **kwargs)
        finally:
            is_stream = isinstance(result, ITERATOR.owner().IteratorWrapper)
            if not is_stream:
                inlet.close()
        return Stream(result, inlet, ref) if is_stream else result

    async def _linked(self, ref: Any) -> _Peer | None:
        """What is known of the model ``ref``, with a link if one can be made; None if it is none of vLLM's."""
        peer = self._peers.get((ref.address, ref.uid))
        if peer is None:
            return None
        if peer.current() is None and time.monotonic() >= peer.not_before:
            async with peer.making:
                if peer.current() is None and time.monotonic() >= peer.not_before:
                    await self._make(peer, ref)
        return peer

    async def _make(self, peer: _Peer, ref: Any) -> None:
        try:
            offered = dict(await asyncio.wait_for(ref.offer_push_link(), ASK))
            name = str(offered.pop("id"))
            peer.link, peer.name = await link.accept(Offer(**offered)), name
        except Exception as error:  # whatever it is, the streams are pulled
            peer.not_before = time.monotonic() + RETRY
            logger.warning("Streams of %s are pulled item by item, there is no link: %s", ref.uid, error)
        self._peers = {known: other for known, other in self._peers.items() if other.is_of_use()}


class Stream:
    """The items of a streaming request, as they arrive; several chunks may be one item.

    Args:
        iterator: xoscar's, of the first item and the end.
        inlet: of the link.
        model: whose slot the request has.
    """

    def __init__(self, iterator: Any, inlet: Inlet, model: Any) -> None:
        self._iterator = iterator
        iterator._gc_destroy = False  # else it is destroyed once more, by a thread for which the event loop waits
        self._inlet = inlet
        self._model = model
        self._end: asyncio.Task[Any] | None = None  # of the actor call for the second item
        self._received = 0  # chunks, after the first
        self._skip: int | None = None  # chunks that are pulled again; None while they are pushed
        self._waiter: asyncio.Future[None] | None = None
        self._is_complete = self._is_closed = False
        inlet.on_change = self._wake

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        if self._end is None:
            item = await self._iterator.__anext__()
            self._end = asyncio.ensure_future(self._iterator.__anext__())
            self._end.add_done_callback(self._wake)
            return item
        while self._skip is None:
            if chunks := self._taken():
                return chunks
            if self._inlet.ended:
                self._is_complete = True
                raise StopAsyncIteration
            if self._end.done():
                return await self._ended(self._end)
            await self._change()
        return await self._pulled()

    def _taken(self) -> bytes:
        """What has arrived since, without the end."""
        items = [data for data, _ in self._inlet.take() if data]
        self._received += len(items)
        return items[0] if len(items) == 1 else b"".join(items)

    async def _ended(self, end: asyncio.Task[Any]) -> Any:
        """The next item when nothing more is pushed."""
        item = end.result()
        marked = _mark(item)
        if PUSHED in marked:
            self._is_complete = True
            raise StopAsyncIteration
        self._skip = max(0, self._received + 1 - marked[PULLED_FROM]) if marked else 0
        return await self._pulled() if marked else item

    async def _pulled(self) -> Any:
        while True:
            item = await self._iterator.__anext__()
            if not self._skip:
                return item
            self._skip -= 1

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self, *_: Any) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def aclose(self) -> None:
        """Release everything; idempotent. A stream that is complete is released in the background."""
        if self._is_closed:
            return
        self._is_closed = True
        self._inlet.close()
        released = asyncio.ensure_future(self._release())
        _releasing.add(released)
        released.add_done_callback(_releasing.discard)
        if not self._is_complete:
            await asyncio.shield(released)

    async def _release(self) -> None:
        try:
            await asyncio.wait_for(self._finish(), ASK)
        except Exception:  # the slot has to be released
            logger.debug("A stream of %s was not ended", self._model.uid, exc_info=True)
        finally:
            with contextlib.suppress(Exception):  # the model process is gone, and the slot with it
                await asyncio.wait_for(RELEASE.owner()._release_model_stream(self._model, self._iterator), ASK)

    async def _finish(self) -> None:
        if self._is_complete and self._end is not None:  # the actor notes its figures behind the last item
            await self._end
            with contextlib.suppress(StopAsyncIteration):
                await self._iterator.__anext__()
            return
        if self._end is not None and not self._end.done():
            self._end.cancel()
        await self._iterator.destroy()


_releasing: set[asyncio.Future[None]] = set()  # kept until they are done


def _mark(item: Any) -> dict[str, int]:
    """What an item that is not for clients says; nothing if it is for them."""
    if not isinstance(item, bytes) or not item.startswith(_MARKED):
        return {}
    marked: dict[str, int] = json.loads(item.removeprefix(b"data: "))[MARK]
    return marked
