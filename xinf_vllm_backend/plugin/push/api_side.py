"""Streams arrive in the API process by a link.

Xinference's API gets its supervisor from one method. What that returns is wrapped, and so are the models that the
supervisor returns: a streaming chat or generate of ours names a link, and reads from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable
from typing import Any

from ...engine.seams.seam import Seam
from ...process import link
from ...process.link import Inlet, LinkLostError, Offer, Receiver
from .. import push
from . import AGAIN, PUSH, RELINK, NotBegunError

logger = logging.getLogger("xinference.vllm_backend")

GET_SUPERVISOR = Seam(
    "xinference.api.restful_api",
    "RESTfulAPI._get_supervisor_ref",
    "pushing streams to the API",
    "the API pulls each item by an actor call",
)
# By which the model process is asked for a link.
METHODS = Seam("xinference.core.model", "ModelActor.__getattr__", GET_SUPERVISOR.used_for, GET_SUPERVISOR.without)
SEAMS = (GET_SUPERVISOR, METHODS)

ASK = 10.0  # seconds for a model to offer a link, and to end a stream
RETRY = 30.0  # seconds after which a link that could not be made is tried again
KNOWN = 1.0  # seconds that an answer of the supervisor is kept
# Calls of the supervisor that change nothing of what is kept begin with one of these.
_ASKING = ("get_", "list_", "describe_", "is_", "resolve_", "report_", "query_")


def install(api: Any) -> None:
    """Have ``api``, Xinference's, read the streams of our models from links."""
    reason = why_pulled()
    if reason is not None:
        logger.warning("Streams are pulled item by item, not pushed: %s", reason)
        return
    original = api._get_supervisor_ref
    links, answers = Links(), Answers()

    @functools.wraps(original)
    async def get_supervisor_ref() -> Any:
        return Supervisor(await original(), links, answers)

    api._get_supervisor_ref = get_supervisor_ref


def why_pulled() -> str | None:
    """Why an API process of this host would read no stream from a link; None if it would."""
    return push.why_pulled(SEAMS)


class Answers:
    """What the supervisor answered, kept for a moment."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[float, Any]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def get(self, method: str, model_uid: str) -> Any:
        """None if it is not kept."""
        until, answer = self._kept.get((method, model_uid), (0.0, None))
        return answer if time.monotonic() < until else None

    def keep(self, method: str, model_uid: str, answer: Any) -> None:
        now = time.monotonic()
        self._kept = {asked: kept for asked, kept in self._kept.items() if now < kept[0]}
        self._kept[method, model_uid] = now + KNOWN, answer


class Supervisor:
    """The reference of Xinference's supervisor, whose models push."""

    def __init__(self, ref: Any, links: Links, answers: Answers) -> None:
        self._ref = ref
        self._links = links
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(_ASKING):
            self._answers.clear()
        return getattr(self._ref, name)

    async def get_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        known = self._answers.get("get_model", model_uid)
        if known is None or not self._links.has(known):  # a link that is lost tells of the end of the model process
            known = await self._ref.get_model(model_uid, *args, **kwargs)
            if self._links.has(known) and await self._is_alone(model_uid):
                self._answers.keep("get_model", model_uid, known)
        return Model(known, self._links)

    async def _is_alone(self, model_uid: str) -> bool:
        """Whether the model has one replica; of several the supervisor chooses one for each request."""
        try:
            return bool((await self.describe_model(model_uid))["replica"] == 1)
        except Exception:  # the first replica may be loading
            return False

    async def describe_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        known = self._answers.get("describe_model", model_uid)
        if known is None:
            known = await self._ref.describe_model(model_uid, *args, **kwargs)
            self._answers.keep("describe_model", model_uid, known)
        return known

    async def resolve_token_router_runtime(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        method = "resolve_token_router_runtime"
        if self._answers.get(method, model_uid):
            return None
        known = await self._ref.resolve_token_router_runtime(model_uid, *args, **kwargs)
        if known is None:  # where there is a router, each request asks which of its runtimes is next
            self._answers.keep(method, model_uid, "no router")
        return known


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
        return await self._links.call(self._ref, "chat", args, kwargs)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        return await self._links.call(self._ref, "generate", args, kwargs)


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

    def has(self, ref: Any) -> bool:
        """Whether there is a link to the model ``ref``."""
        peer = self._peers.get((ref.address, ref.uid))
        return peer is not None and peer.current() is not None

    async def is_vllm(self, ref: Any) -> bool:
        if self.has(ref):  # else another process may have the address
            return True
        if not await ref.is_vllm_backend():
            return False
        self._peers.setdefault((ref.address, ref.uid), _Peer())
        return True

    async def call(self, ref: Any, method: str, args: Any, kwargs: Any) -> Any:
        """Call ``method`` of the model ``ref``, and have it push the stream, if it is one."""
        config = args[1] if len(args) > 1 else kwargs.get("generate_config")
        is_stream = isinstance(config, dict) and config.get("stream")
        peer = await self._linked(ref)  # by which it is known that the process lives, too
        if is_stream and peer is not None and (current := peer.current()) is not None:
            inlet = current.open()
            call = asyncio.ensure_future(getattr(ref, PUSH)(method, peer.name, inlet.key, args, kwargs))
            with contextlib.suppress(NotBegunError):
                return await Stream(call, inlet, functools.partial(self._again, ref, (peer.name, inlet.key))).begun()
        return await getattr(ref, method)(*args, **kwargs)

    async def _linked(self, ref: Any, now: bool = False) -> _Peer | None:
        """What is known of the model ``ref``, with a link if one can be made; None if it is none of vLLM's.

        Args:
            now: even if it could not be made a moment ago.
        """
        peer = self._peers.get((ref.address, ref.uid))
        if peer is None:
            return None
        if peer.current() is None and (now or time.monotonic() >= peer.not_before):
            async with peer.making:
                if peer.current() is None and (now or time.monotonic() >= peer.not_before):
                    await self._make(peer, ref)
        return peer

    async def _make(self, peer: _Peer, ref: Any) -> None:
        try:
            offered = dict(await asyncio.wait_for(ref.offer_push_link(), ASK))
            name = str(offered.pop("id"))
            peer.link, peer.name = await link.accept(Offer(**offered)), name
            gc.freeze()  # as at the start; the first requests import more
        except Exception as error:  # whatever it is, the streams are pulled
            peer.not_before = time.monotonic() + RETRY
            logger.warning("Streams of %s are pulled item by item, there is no link: %s", ref.uid, error)
        self._peers = {known: other for known, other in self._peers.items() if other.is_of_use()}
        self._peers[ref.address, ref.uid] = peer

    async def _again(self, ref: Any, first: tuple[str, int], received: int) -> Inlet:
        """The stream that began as ``first``, behind the ``received`` items, by another link.

        Raises:
            LinkLostError: there is no other.
            Exception: what the actor call raised.
        """
        peer = await self._linked(ref, now=True)
        if peer is None or (current := peer.current()) is None:
            raise LinkLostError(f"There is no link to {ref.uid!r}.")
        inlet = current.open()
        try:
            await asyncio.wait_for(getattr(ref, AGAIN)(first, peer.name, inlet.key, received), ASK)
        except BaseException:
            inlet.close()
            raise
        return inlet


class Stream:
    """The items of a streaming request, as they arrive; several chunks may be one item.

    Args:
        call: the actor call that lasts as long as the stream.
        inlet: of the link.
        again: given how many items have been received, returns the inlet of another link.
    """

    def __init__(self, call: asyncio.Future[Any], inlet: Inlet, again: Callable[[int], Any]) -> None:
        self._call = call
        self._inlet = inlet
        self._again = again
        self._before = 0  # items received by the links before
        self._waiter: asyncio.Future[None] | None = None
        call.add_done_callback(self._wake)
        inlet.on_change = self._wake

    async def begun(self) -> Any:
        """This stream when it is admitted; what the call returns if it makes none.

        Raises:
            Exception: what the call raised.
        """
        try:
            while not self._inlet.received:
                if self._call.done():
                    self._inlet.close()
                    return self._call.result()
                if self._inlet.lost:
                    await self._relink()
                else:
                    await self._change()
        except BaseException:
            await self.aclose()
            raise
        return self

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        while True:
            if chunks := b"".join([data for data, _ in self._inlet.take()]):
                return chunks
            if self._inlet.ended:
                raise StopAsyncIteration
            if self._call.done():
                raise self._call.exception() or LinkLostError("The stream ended, and its end was lost.")
            if self._inlet.lost:
                await self._relink()
            else:
                await self._change()

    async def _relink(self) -> None:
        """Go on by another link; returns when there is one, or the call has ended."""
        self._before += self._inlet.received
        until = time.monotonic() + RELINK
        while not self._call.done():
            try:
                self._inlet = await self._again(self._before)
            except Exception as error:  # the model process may be stopped, or gone
                if time.monotonic() >= until:
                    raise
                logger.info("A stream waits for another link: %s", error)
                await asyncio.wait({self._call}, timeout=1.0)
            else:
                self._inlet.on_change = self._wake
                return

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
        """Release everything; idempotent."""
        _ending.add(self._call)
        self._call.add_done_callback(self._ended)
        if self._inlet.ended and not self._inlet.lost:
            self._inlet.on_change = self._forget
            return
        self._inlet.close()
        self._call.cancel()
        if not self._inlet.ended:
            await asyncio.wait({self._call}, timeout=ASK)  # xoscar asks the model process, which may be stopped

    def _forget(self) -> None:
        """The link is lost behind the end: the call would wait for another one."""
        self._call.cancel()

    def _ended(self, call: asyncio.Future[Any]) -> None:
        self._inlet.close()
        _ending.discard(call)
        if not call.cancelled() and (error := call.exception()) is not None:
            logger.debug("A stream was not ended: %s", error)


_ending: set[asyncio.Future[Any]] = set()  # calls whose streams are closed, kept until they are done
