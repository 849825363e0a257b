"""A request to a model process, in the API process: it goes on by another link, or at another process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from ...errors import CannotResumeError, EngineStoppedError
from ...process.link import Inlet, LinkLostError
from . import PUSH, RELINK, OtherProcessError
from .links import ASK, Links
from .lost import is_away, is_full, is_passing, is_process_lost, is_silent
from .request import Request
from .served import Replica, Served

logger = logging.getLogger("xinference.vllm_backend")

ENDING = 1.0  # seconds in which the link to a process that ends is lost
SOON = 2.0  # seconds for a silent process to answer, where another replica lives
PATIENCE = 5.0  # seconds for an engine that is being restarted to come back, where another replica lives
BUSY = 0.5  # seconds after which a request that goes on is sent again to a replica that admits no more


class Stream:
    """The answer to a request, if it is a stream: its items as they arrive; several chunks may be one item.

    Args:
        request: what is asked.
        links: of this process.
        replica: where it is asked first.
        served: where it goes on when the model process dies; None: then it fails.

    Raises:
        LinkLostError: there is no link to ``replica`` any more.
    """

    def __init__(self, request: Request, links: Links, replica: Replica, served: Served | None = None) -> None:
        self._request = request
        self._links = links
        self._served = served
        self._waiter: asyncio.Future[None] | None = None
        self._admitted = False  # by the process that works on it now
        self._chunks = b""  # that are not read yet
        self._since: float | None = None  # when it was first sent again, without being admitted since
        self._send(replica)

    @property
    def ref(self) -> Any:
        """The model actor that works on it now; None while none does."""
        return None if self._call.done() else self._ref

    def _send(self, replica: Replica) -> None:
        current = None if replica.peer is None else replica.peer.current()
        if replica.peer is None or current is None:
            raise LinkLostError(f"There is no link to {replica.uid} any more.")
        self._replica, self._ref = replica, replica.ref
        self._inlet: Inlet = current.open()
        self._inlet.on_change = self._wake
        self._before = 0  # items received by the links before
        self._first = replica.peer.name, self._inlet.key  # by which the model process knows it
        self._admitted = False
        request, served = self._request, self._served
        patience = PATIENCE if served is not None and served.has_ready(replica) else None
        asked = None if served is None else request.asked(patience)
        self._call: asyncio.Future[Any] = asyncio.ensure_future(
            getattr(self._ref, PUSH)(request.method, *self._first, request.args, request.kwargs, asked)
        )
        self._call.add_done_callback(self._wake)
        replica.requests[request] = None
        request.entry.sent()

    async def begun(self) -> Any:
        """This stream when it is admitted; what the model returns if it makes none.

        Raises:
            NotBegunError: the link was lost before the model process looked at it.
            Exception: what the model raised.
        """
        try:
            while not self._take():
                if self._call.done() and not self._call.cancelled() and self._call.exception() is None:
                    self._leave()
                    self._inlet.close()
                    return self._call.result()
                await self._advance()
        except BaseException:
            await self.aclose()
            raise
        return self

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        while True:
            self._take()
            if self._chunks:
                chunks, self._chunks = self._chunks, b""
                return chunks
            if self._inlet.ended:
                raise StopAsyncIteration
            await self._advance()

    def _take(self) -> bool:
        """Take what has come; whether the model has admitted the request."""
        items = self._inlet.take()
        self._admitted = self._admitted or any(not (data or note) for data, note in items)
        self._chunks += self._request.take(items)
        return self._admitted

    async def _advance(self) -> None:
        """Wait for something new, and go on elsewhere where none can come."""
        if self._call.done():
            if self._call.cancelled():
                await self._go_on_if_ended()
                return
            await self._go_on(self._call.exception() or LinkLostError("The stream ended, and its end was lost."))
        elif self._inlet.lost:
            await self._relink()
        else:
            await self._change()

    async def _go_on_if_ended(self) -> None:
        """The process has cancelled the call: because it ends, or because the request was aborted by its id."""
        until = time.monotonic() + ENDING
        while not self._inlet.lost and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._change(), left)
        if not self._inlet.lost:
            raise asyncio.CancelledError
        await self._go_on(ConnectionResetError(f"The model process of {self._replica.uid} has ended."))

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self, *_: Any) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- by another link

    async def _relink(self) -> None:
        """Go on by another link to the same process, or at another where that is gone or silent."""
        received = self._before + self._inlet.received
        until = time.monotonic() + (RELINK if self._served is None else self._served.recovery_timeout)
        while not self._call.done() and (error := await self._reach(received)) is not None:
            if self._is_to_leave(error):
                await self._go_on(error)
                return
            if time.monotonic() >= until:
                raise error if self._served is None else self._served.overdue()
            logger.info("A stream waits for another link: %s", error)
            await asyncio.wait({self._call}, timeout=1.0)

    async def _reach(self, received: int) -> Exception | None:
        """Go on by another link to the same process, behind the ``received`` items; why not, if that cannot be."""
        try:
            bound = SOON if self._served is not None and self._served.has_other(self._replica) else None
            self._inlet = await asyncio.wait_for(self._links.again(self._ref, self._first, received), bound)
        except Exception as error:  # the model process may be stopped, or gone
            return error
        self._before = received
        self._inlet.on_change = self._wake
        return None

    def _is_to_leave(self, error: Exception) -> bool:
        """Whether the process is given up to which no link can be made: it is gone, or silent and another is not."""
        if self._served is None:
            return False
        return is_process_lost(error) or (is_silent(error) and self._served.has_other(self._replica))

    # -- at another process

    async def _go_on(self, error: BaseException) -> None:
        """Have another process go on with what was asked; raises ``error`` where none can."""
        served, request = self._served, self._request
        if is_superseded := isinstance(error, OtherProcessError):
            self._links.supersede(self._ref, self._first[0])
        if served is None:
            raise error
        if is_full(error) and not request.was_admitted:
            request.full.add(self._replica.uid)
            if not await served.has_room(request):
                raise error
        passing = is_passing(error) and (request.was_admitted or isinstance(error, LinkLostError) or is_full(error))
        if is_away(error) and served.has_ready(self._replica):
            served.avoid(self._replica)
            passing = True
        if not (passing or self._is_lost(error)) or (passing and self._is_overdue(served)):
            raise error
        if not passing:
            served.lost(self._replica, self._ref, is_silent(error))
            request.was_admitted, self._since = True, None
        self._drop()
        async with served.paced:
            while True:
                if is_superseded:
                    is_superseded = False
                elif passing and not is_away(error) and (request.was_admitted or not is_full(error)):
                    await asyncio.sleep(BUSY)
                self._check()
                try:
                    self._send(await served.replica_for(request))
                except LinkLostError:  # just now, or there is none
                    passing = True
                    if self._is_overdue(served):
                        raise served.overdue() from None
                else:
                    break
            if not self._call.done() and not self._inlet.received:
                await self._change()

    def _is_overdue(self, served: Served) -> bool:
        """Whether it has been sent again and again for too long without being admitted."""
        if self._admitted or self._since is None:
            self._since = time.monotonic()
        return time.monotonic() - self._since > served.recovery_timeout

    def _is_lost(self, error: BaseException) -> bool:
        assert self._served is not None
        if isinstance(error, EngineStoppedError):  # with its worker, or its replica alone
            return self._served.ended is None and self._served.has_other(self._replica)
        return is_process_lost(error) or is_silent(error)

    def _check(self) -> None:
        if self._request.refused is not None:
            raise self._request.refused
        if not self._request.can_go_on():
            raise CannotResumeError(
                f"The model process died after the request {self._request.id} had begun, and a request for several "
                "choices cannot go on at another; send it again."
            )

    def _drop(self) -> None:
        """Have nothing more to do with the process that worked on it."""
        self._replica.requests.pop(self._request, None)
        _ending.add(self._call)
        self._call.add_done_callback(_ended)
        self._call.cancel()
        self._inlet.close()

    # -- the end

    def _leave(self) -> None:
        self._replica.requests.pop(self._request, None)
        self._request.entry.further.set()

    async def aclose(self) -> None:
        """Release everything; idempotent."""
        self._leave()
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
        _ended(call)


def _ended(call: asyncio.Future[Any]) -> None:
    _ending.discard(call)
    if not call.cancelled() and (error := call.exception()) is not None:
        logger.debug("A stream was not ended: %s", error)


_ending: set[asyncio.Future[Any]] = set()  # calls whose streams are closed, kept until they are done
