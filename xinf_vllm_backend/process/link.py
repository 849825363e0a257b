"""A link by which one process pushes the items of many streams to another.

The sender writes at most one frame that is not acknowledged. What its streams put meanwhile waits, and goes into the
next frame together: so items are gathered exactly when the receiver is behind, and no timer is needed. A stream whose
reader is slow is paused alone. Both ends send heartbeats, and a link whose peer is silent is lost.

Each link is offered once: the socket that it is made by is closed as soon as the peer has shown its token, or after
:data:`OFFERED` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import secrets
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

logger = logging.getLogger(__name__)

OFFERED = 10.0  # seconds that a link waits for its peer
ANSWER = 5.0  # seconds for each step of making it
BEAT = 2.0  # seconds between heartbeats
SILENCE = 10.0  # seconds without a word of the peer after which the link is lost
MAX_FRAME = 256 << 20  # bytes
HIGH = 64 << 10  # bytes that wait for a reader: above, its stream is paused until it has taken them
HELLO = b"xvl1"
TOKEN = 16  # bytes that each end shows

_FRAME = struct.Struct("!BI")  # kind, bytes that follow
_ITEM = struct.Struct("!QBII")  # stream, whether it is the last, bytes of data, bytes of the note
_NUMBER = struct.Struct("!I")
ITEMS, ACKNOWLEDGED, RESUMED, CLOSED, ALIVE = range(1, 6)


class LinkLostError(ConnectionError):
    """The link has ended; takes one sentence."""


@dataclass(frozen=True)
class Offer:
    """Where a link can be made, once.

    Attributes:
        path: of a Unix socket.
        host: address on which it listens, too.
        port: there.
        token: hexadecimal; its first half is shown by the receiver, and its second half by the sender.
    """

    path: str
    host: str
    port: int
    token: str


class _End(asyncio.Protocol):
    """Either end: frames, heartbeats, and how it is lost."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()
        self._heard = self._looked = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.lost: str | None = None  # why
        self.made = self._loop.create_future()  # True once both ends have shown their half of the token

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(f"the connection was closed: {error}" if error else "the peer closed the connection")

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._rest += data
        try:
            self._read()
        except (ValueError, struct.error, IndexError) as error:
            self.close(f"the peer sent what is no frame: {error}")

    # -- frames

    def _read(self) -> None:
        """Take all whole frames."""
        while self.lost is None:
            if not self.made.done():
                if not self._greeted():
                    return
                continue
            if len(self._rest) < _FRAME.size:
                return
            kind, length = _FRAME.unpack_from(self._rest)
            if not ITEMS <= kind <= ALIVE or length > MAX_FRAME:
                raise ValueError(f"kind {kind} with {length} bytes")
            if len(self._rest) < _FRAME.size + length:
                return
            body = bytes(memoryview(self._rest)[_FRAME.size : _FRAME.size + length])
            del self._rest[: _FRAME.size + length]
            self._frame(kind, body)

    def _greeted(self) -> bool:
        """Take what the peer says first; False if it has not said all of it."""
        raise NotImplementedError

    def _frame(self, kind: int, body: bytes) -> None:
        """Take a frame."""
        raise NotImplementedError

    def _begin(self) -> None:
        """The peer is the right one."""
        self.made.set_result(True)
        self._timer = self._loop.call_later(BEAT, self._beat)

    def _write(self, kind: int, *parts: bytes) -> None:
        if self._transport is not None and self.lost is None:
            self._transport.write(b"".join((_FRAME.pack(kind, sum(map(len, parts))), *parts)))

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._looked > 2 * BEAT:  # we were asleep: what the peer said may be unread
            self._heard = max(self._heard, now - SILENCE + BEAT)
        self._looked = now
        if now - self._heard > SILENCE:
            self.close(f"the peer was silent for {now - self._heard:.0f} s")
            return
        self._write(ALIVE)
        self._timer = self._loop.call_later(BEAT, self._beat)

    # -- the end

    def close(self, reason: str = "it was closed") -> None:
        """End the link; idempotent."""
        transport = self._transport
        self._lose(reason)
        if transport is not None:
            transport.abort()

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        if self._timer is not None:
            self._timer.cancel()
        if not self.made.done():
            self.made.set_result(False)
        self._forget_streams()

    def _forget_streams(self) -> None:
        """Tell all streams that the link is lost."""
        raise NotImplementedError


# -- the sender


class Sender(_End):
    """The end that pushes.

    Args:
        token: of the offer.
        on_end: called once when the link is lost.
    """

    def __init__(self, token: bytes, on_end: Callable[[Sender], None] = lambda link: None) -> None:
        super().__init__()
        self._token = token
        self._on_end = on_end
        self._streams: dict[int, Outlet] = {}
        self._waiting: list[tuple[Outlet, bytes]] = []
        self._in_flight: list[Outlet] = []
        self._number = 0  # of the last frame
        self._scheduled = False

    def __len__(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def open(self, key: int) -> Outlet:
        """The stream ``key``, which the receiver has opened.

        Raises:
            LinkLostError: there is no link any more.
        """
        if self.lost is not None:
            raise LinkLostError(f"The link is lost: {self.lost}.")
        self._streams[key] = outlet = Outlet(self, key)
        return outlet

    def put(self, outlet: Outlet, item: bytes) -> None:
        self._waiting.append((outlet, item))
        if not self._in_flight and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)  # behind all that woke in this turn of the loop

    def forget(self, outlet: Outlet) -> None:
        self._streams.pop(outlet.key, None)

    def _flush(self) -> None:
        self._scheduled = False
        if self.lost is not None or self._in_flight or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._in_flight = list(dict.fromkeys(outlet for outlet, _ in waiting))
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._write(ITEMS, _NUMBER.pack(self._number), *(item for _, item in waiting))
        for outlet in self._in_flight:
            outlet.flushed()

    def _greeted(self) -> bool:
        hello = HELLO + self._token[:TOKEN]
        if len(self._rest) < len(hello):
            return False
        if not hmac.compare_digest(bytes(self._rest[: len(hello)]), hello):
            self.close("the peer has not the token")
            return False
        del self._rest[: len(hello)]
        assert self._transport is not None
        self._transport.write(HELLO + self._token[TOKEN:])
        self._begin()
        return True

    def _frame(self, kind: int, body: bytes) -> None:
        if kind == ALIVE:
            return
        if kind == ACKNOWLEDGED:
            self._acknowledged(body)
        elif kind == RESUMED:
            for outlet in self._named(body):
                outlet.resumed()
        elif kind == CLOSED:
            for outlet in self._named(body):
                outlet.closed()
        else:
            raise ValueError(f"kind {kind} from a receiver")

    def _acknowledged(self, body: bytes) -> None:
        (number,) = _NUMBER.unpack_from(body)
        if number != self._number or not self._in_flight:
            raise ValueError(f"frame {number} is acknowledged, and {self._number} was sent")
        arrived, self._in_flight = self._in_flight, []
        for outlet in self._named(body[_NUMBER.size :]):
            outlet.paused = True
        for outlet in arrived:
            outlet.arrived()
        self._flush()

    def _named(self, keys: bytes) -> Iterable[Outlet]:
        found = (self._streams.get(key) for (key,) in struct.iter_unpack("!Q", keys))
        return [outlet for outlet in found if outlet is not None]

    def _forget_streams(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for outlet in streams:
            outlet.wake()
        self._on_end(self)


class Outlet:
    """A stream at its sender.

    Attributes:
        acknowledged: how many items the receiver has.
        paused: its reader is slow.
        abandoned: nobody reads it any more.
    """

    def __init__(self, link: Sender, key: int) -> None:
        self.key = key
        self.acknowledged = 0
        self.paused = False
        self.abandoned = False
        self._link = link
        self._waiting = self._in_flight = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def lost(self) -> str | None:
        """Why the link is lost; None while it is not."""
        return self._link.lost

    def put(self, data: bytes, note: bytes = b"", last: bool = False) -> None:
        """Send an item, as soon as the receiver has those before."""
        self._waiting += 1
        self._link.put(self, _ITEM.pack(self.key, last, len(data), len(note)) + data + note)

    async def ready(self) -> None:
        """Wait until the next item would be sent with the next frame.

        Raises:
            LinkLostError: the link is lost; ``acknowledged`` says what has arrived.
        """
        while self._checked() and (self._waiting or self.paused) and not self.abandoned:
            await self._change()

    async def finish(self) -> None:
        """Wait until all items have arrived.

        Raises:
            LinkLostError: the link is lost before.
        """
        while self._checked() and (self._waiting or self._in_flight) and not self.abandoned:
            await self._change()

    def close(self) -> None:
        """Take no more part in the link; idempotent."""
        self._link.forget(self)

    def _checked(self) -> bool:
        if self._link.lost is not None:
            raise LinkLostError(f"The link is lost: {self._link.lost}.")
        return True

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def flushed(self) -> None:
        self._in_flight, self._waiting = self._waiting, 0
        self.wake()

    def arrived(self) -> None:
        self.acknowledged += self._in_flight
        self._in_flight = 0
        self.wake()

    def resumed(self) -> None:
        self.paused = False
        self.wake()

    def closed(self) -> None:
        self.abandoned = True
        self.wake()


# -- the receiver


class Receiver(_End):
    """The end that reads.

    Args:
        token: of the offer.
    """

    def __init__(self, token: bytes) -> None:
        super().__init__()
        self._token = token
        self._streams: dict[int, Inlet] = {}
        self._keys = itertools.count(1)

    def open(self) -> Inlet:
        """A new stream, whose key the sender is to be told.

        Raises:
            LinkLostError: there is no link any more.
        """
        if self.lost is not None:
            raise LinkLostError(f"The link is lost: {self.lost}.")
        inlet = Inlet(self, next(self._keys))
        self._streams[inlet.key] = inlet
        return inlet

    def resume(self, inlet: Inlet) -> None:
        self._write(RESUMED, struct.pack("!Q", inlet.key))

    def forget(self, inlet: Inlet) -> None:
        if self._streams.pop(inlet.key, None) is not None and not inlet.ended:
            self._write(CLOSED, struct.pack("!Q", inlet.key))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._transport is not None
        self._transport.write(HELLO + self._token[:TOKEN])

    def _greeted(self) -> bool:
        hello = HELLO + self._token[TOKEN:]
        if len(self._rest) < len(hello):
            return False
        if not hmac.compare_digest(bytes(self._rest[: len(hello)]), hello):
            self.close("the peer has not the token")
            return False
        del self._rest[: len(hello)]
        self._begin()
        return True

    def _frame(self, kind: int, body: bytes) -> None:
        if kind == ALIVE:
            return
        if kind != ITEMS:
            raise ValueError(f"kind {kind} from a sender")
        paused = {inlet.key for inlet in self._delivered(body) if inlet.is_full()}
        self._write(ACKNOWLEDGED, body[: _NUMBER.size], *(struct.pack("!Q", key) for key in paused))

    def _delivered(self, body: bytes) -> list[Inlet]:
        """Give each item of a frame to its stream; those streams, each woken once."""
        found: dict[int, Inlet] = {}
        at = _NUMBER.size
        while at < len(body):
            key, last, length, noted = _ITEM.unpack_from(body, at)
            at += _ITEM.size
            if at + length + noted > len(body):
                raise ValueError("an item that is longer than its frame")
            inlet = self._streams.get(key)
            if inlet is not None:  # else it was closed meanwhile
                inlet.take_in(body[at : at + length], body[at + length : at + length + noted], bool(last))
                found[key] = inlet
            at += length + noted
        for inlet in found.values():
            inlet.on_change()
        return list(found.values())

    def _forget_streams(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for inlet in streams:
            inlet.on_change()


class Inlet:
    """A stream at its receiver.

    Attributes:
        key: to tell the sender.
        received: how many items have come.
        ended: the last of them has.
        on_change: called when there is something new: items, or the loss of the link.
    """

    def __init__(self, link: Receiver, key: int) -> None:
        self.key = key
        self.received = 0
        self.ended = False
        self.on_change: Callable[[], None] = lambda: None
        self._link = link
        self._items: list[tuple[bytes, bytes]] = []
        self._size = 0
        self._paused = False

    @property
    def lost(self) -> str | None:
        """Why the link is lost; None while it is not."""
        return self._link.lost

    def take(self) -> list[tuple[bytes, bytes]]:
        """Data and note of each item that has come since."""
        items, self._items, self._size = self._items, [], 0
        if self._paused:
            self._paused = False
            self._link.resume(self)
        return items

    def close(self) -> None:
        """Read no more; idempotent."""
        self._items = []
        self._link.forget(self)

    def take_in(self, data: bytes, note: bytes, last: bool) -> None:
        self.received += 1
        self._items.append((data, note))
        self._size += len(data) + len(note)
        self.ended = self.ended or last

    def is_full(self) -> bool:
        """Whether the sender has to pause the stream; remembered, so that it is told to go on."""
        self._paused = self._size > HIGH
        return self._paused


# -- how a link is made


async def offer(
    host: str, on_made: Callable[[Sender], None], on_end: Callable[[Sender], None] = lambda link: None
) -> Offer:
    """Wait in the background for the receiver of a link, on a Unix socket and on ``host``.

    Args:
        host: address of this process by which others reach it.
        on_made: called with the link.
        on_end: called when that link is lost.

    Raises:
        OSError: no socket can be made.
    """
    making = _Making(on_made, on_end)
    try:
        return await making.listen(host)
    except BaseException:
        making.end()
        raise


class _Making:
    """The sockets of an offer, until the link is made or the time is over."""

    def __init__(self, on_made: Callable[[Sender], None], on_end: Callable[[Sender], None]) -> None:
        self._token = secrets.token_bytes(2 * TOKEN)
        self._on_made = on_made
        self._on_end = on_end
        self._directory: str | None = None
        self._servers: list[asyncio.Server] = []
        self._connected: set[Sender] = set()
        self._is_over = False

    async def listen(self, host: str) -> Offer:
        loop = asyncio.get_running_loop()
        path = ""
        with contextlib.suppress(OSError):  # no directory, or its name is too long
            self._directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="xvl-")  # mode 0700
            self._servers.append(await loop.create_unix_server(self._accepted, f"{self._directory}/s"))
            path = f"{self._directory}/s"
        self._servers.append(await loop.create_server(self._accepted, host, 0))
        loop.call_later(OFFERED, self.end)
        return Offer(path, host, self._servers[-1].sockets[0].getsockname()[1], self._token.hex())

    def _accepted(self) -> Sender:
        link = Sender(self._token, self._on_end)
        self._connected.add(link)
        link.made.add_done_callback(lambda made: self._greeted(link, made.result()))
        return link

    def _greeted(self, link: Sender, made: bool) -> None:
        self._connected.discard(link)
        if made and self._is_over:
            link.close("the offer was taken already")
        elif made:
            self.end()
            self._on_made(link)

    def end(self) -> None:
        """Close the sockets, and what has not shown its token; idempotent."""
        if self._is_over:
            return
        self._is_over = True
        for server in self._servers:
            server.close()
        for link in list(self._connected):
            link.close("the offer is over")
        if self._directory is not None:
            asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self._directory, True)


async def accept(offered: Offer) -> Receiver:
    """Make the link that was offered: by its Unix socket where that is here, else by its address.

    Raises:
        LinkLostError: it cannot be made.
    """
    why = f"No link could be made to {offered.host}:{offered.port}"
    try:
        link = await asyncio.wait_for(_connected(offered, bytes.fromhex(offered.token)), ANSWER)
    except (OSError, asyncio.TimeoutError) as error:
        raise LinkLostError(f"{why}: {error or 'there was no answer'}.") from None
    await asyncio.wait([link.made], timeout=ANSWER)
    if not link.made.done():
        link.close("there was no answer")
    if link.lost is not None:
        raise LinkLostError(f"{why}: {link.lost}.")
    return link


async def _connected(offered: Offer, token: bytes) -> Receiver:
    loop = asyncio.get_running_loop()
    if offered.path:
        with contextlib.suppress(OSError):  # of another host, or another mount namespace
            return (await loop.create_unix_connection(lambda: Receiver(token), offered.path))[1]
    return (await loop.create_connection(lambda: Receiver(token), offered.host, offered.port))[1]
