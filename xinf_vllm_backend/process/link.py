"""A link by which one process pushes the items of many streams to another.

The sender writes at most one frame that is not acknowledged. What its streams put meanwhile waits, and goes into the
next frame together: so items are gathered exactly when the receiver is behind, and no timer is needed. A stream whose
reader is slow is paused alone. Both ends send heartbeats, and a link whose peer is silent is lost.

Each link is offered once: the socket that it is made by is closed as soon as the peer has shown its token, or after
:data:`OFFERED` seconds.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import hmac
import itertools
import secrets
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

OFFERED = 10.0  # seconds that a link waits for its peer
ANSWER = 5.0  # seconds that the offer has to answer the receiver
PENDING = 64  # connections of one offer that have not shown the token; the oldest gives way
BEAT = 2.0  # seconds between heartbeats
SILENCE = 10.0  # seconds without a word of the peer after which the link is lost
STUCK = 60.0  # seconds after which a link is lost whose peer lives and does not acknowledge a frame
MAX_FRAME = 256 << 20  # bytes
HIGH = 64 << 10  # bytes that wait for a reader: above, its stream is paused until it has taken them
HELLO = b"xvl1"
TOKEN = 16  # bytes that each end shows

_FRAME = struct.Struct("!BI")  # kind, bytes that follow
_ITEM = struct.Struct("!QBII")  # stream, whether it is the last, bytes of data, bytes of the note
_NUMBER = struct.Struct("!I")
_KEY = struct.Struct("!Q")
ITEMS, ACKNOWLEDGED, RESUMED, CLOSED, ALIVE = range(1, 6)


class LinkLostError(ConnectionError):
    """The link has ended; takes one sentence."""


class _GarbageError(Exception):
    """The peer sent what is no frame; takes one phrase."""


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
    token: str = field(repr=False)  # not for logs


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
        self._transport = cast(asyncio.Transport, transport)  # those of uvloop are no instances of it
        if self.lost is not None:  # closed before it was connected
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(f"the connection was closed: {error}" if error else "the peer closed the connection")

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        self._heard = self._loop.time()
        self._rest += data
        try:
            self._read()
        except (_GarbageError, struct.error) as error:
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
                raise _GarbageError(f"kind {kind} with {length} bytes")
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

    def _has_shown(self, half: bytes) -> bool:
        """Take the peer's half of the token; False if it has not said all of it, or another, which ends the link."""
        hello = HELLO + half
        if len(self._rest) < len(hello):
            return False
        if not hmac.compare_digest(bytes(self._rest[: len(hello)]), hello):
            self.close("the peer has not the token")
            return False
        del self._rest[: len(hello)]
        return True

    def _begin(self) -> None:
        """The peer is the right one."""
        self.made.set_result(True)
        self._timer = self._loop.call_later(BEAT, self._beat)

    def _write(self, kind: int, *parts: bytes) -> None:
        if self._transport is not None and self.lost is None:
            self._transport.write(b"".join((_FRAME.pack(kind, sum(map(len, parts))), *parts)))

    def _beat(self) -> None:
        now = self._loop.time()
        overslept = max(0.0, now - self._looked - BEAT)  # it does not count: what the peer said may be unread
        self._heard = min(now, self._heard + overslept)
        self._looked = now
        if now - self._heard > SILENCE:
            self.close(f"the peer was silent for {now - self._heard:.0f} s")
            return
        if self._is_stuck(overslept):
            self.close(f"the peer has not acknowledged a frame for {STUCK:.0f} s")
            return
        self._write(ALIVE)
        self._timer = self._loop.call_later(BEAT, self._beat)

    def _is_stuck(self, overslept: float) -> bool:
        """Whether the peer lives and does not do its part; called with each heartbeat.

        Args:
            overslept: seconds that the heartbeat is late.
        """
        return False

    # -- the end

    def close(self, reason: str = "it was closed") -> None:
        """End the link; idempotent."""
        self._lose(reason)
        if self._transport is not None:
            self._transport.abort()

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        self._rest.clear()
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
        on_made: called when the receiver has shown its half of the token.
        on_end: called once when the link is lost, also if it was not made.
    """

    def __init__(self, token: bytes, on_made: Callable[[Sender], None], on_end: Callable[[Sender], None]) -> None:
        super().__init__()
        self._token = token
        self._on_made = on_made
        self._on_end = on_end
        self._streams: dict[int, Outlet] = {}
        self._waiting: list[tuple[Outlet, bytes]] = []
        self._in_flight: Counter[Outlet] = Counter()  # items of each in the frame that is not acknowledged
        self._number = 0  # of the last frame
        self._sent = 0.0  # when it was sent
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
        items = self._gathered()
        self._in_flight = Counter(outlet for outlet, _ in items)
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._sent = self._loop.time()
        self._write(ITEMS, _NUMBER.pack(self._number), *(item for _, item in items))
        for outlet, count in self._in_flight.items():
            outlet.flushed(count)

    def _is_stuck(self, overslept: float) -> bool:
        self._sent += overslept
        return bool(self._in_flight) and self._loop.time() - self._sent > STUCK

    def _gathered(self) -> list[tuple[Outlet, bytes]]:
        """The items that wait, as many as fit in a frame."""
        sizes = list(itertools.accumulate((len(item) for _, item in self._waiting), initial=_NUMBER.size))
        count = bisect.bisect_right(sizes, MAX_FRAME) - 1
        items, self._waiting = self._waiting[:count], self._waiting[count:]
        return items

    def _greeted(self) -> bool:
        if not self._has_shown(self._token[:TOKEN]):
            return False
        assert self._transport is not None
        self._transport.write(HELLO + self._token[TOKEN:])
        self._begin()
        self._on_made(self)
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
            raise _GarbageError(f"kind {kind} from a receiver")

    def _acknowledged(self, body: bytes) -> None:
        (number,) = _NUMBER.unpack_from(body)
        if number != self._number or not self._in_flight:
            raise _GarbageError(f"frame {number} is acknowledged, and {self._number} was sent")
        arrived, self._in_flight = self._in_flight, Counter()
        for outlet in self._named(body[_NUMBER.size :]):
            outlet.paused = True
        for outlet in arrived:
            outlet.arrived()
        self._flush()

    def _named(self, keys: bytes) -> Iterable[Outlet]:
        found = (self._streams.get(key) for (key,) in _KEY.iter_unpack(keys))
        return [outlet for outlet in found if outlet is not None]

    def _forget_streams(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        self._waiting, self._in_flight = [], Counter()
        for outlet in streams:
            outlet.wake()
        self._on_end(self)


class Outlet:
    """A stream at its sender.

    Attributes:
        acknowledged: how many items the receiver has.
        paused: its reader is slow.
        abandoned: nobody reads it any more, or it was closed here: nothing more is sent.
    """

    def __init__(self, link: Sender, key: int) -> None:
        self.key = key
        self.acknowledged = 0
        self.paused = False
        self.abandoned = False
        self._link = link
        self._waiting = self._in_flight = 0
        self._changed = asyncio.Event()

    @property
    def lost(self) -> str | None:
        """Why the link is lost; None while it is not."""
        return self._link.lost

    def put(self, data: bytes, note: bytes = b"", last: bool = False) -> None:
        """Send an item, as soon as the receiver has those before; to be called after :meth:`ready`.

        Raises:
            ValueError: it is larger than :data:`MAX_FRAME`.
        """
        if self.abandoned or self._link.lost is not None:
            return
        if _NUMBER.size + _ITEM.size + len(data) + len(note) > MAX_FRAME:
            raise ValueError(f"An item of {len(data) + len(note)} bytes does not fit in a frame of {MAX_FRAME}.")
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
        """Take no more part in the link; idempotent. What was put is still sent."""
        self.closed()

    def _checked(self) -> bool:
        if self._link.lost is not None:
            raise LinkLostError(f"The link is lost: {self._link.lost}.")
        return True

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()

    def flushed(self, count: int) -> None:
        self._waiting -= count
        self._in_flight = count
        self.wake()

    def arrived(self) -> None:
        self.acknowledged += self._in_flight
        self._in_flight = 0
        self.wake()

    def resumed(self) -> None:
        self.paused = False
        self.wake()

    def closed(self) -> None:
        self._link.forget(self)
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
        self._keys = itertools.count(secrets.randbits(63))  # a key of another link names no stream of this one

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
        self._write(RESUMED, _KEY.pack(inlet.key))

    def forget(self, inlet: Inlet) -> None:
        if self._streams.pop(inlet.key, None) is not None and not inlet.ended:
            self._write(CLOSED, _KEY.pack(inlet.key))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._transport is not None
        self._transport.write(HELLO + self._token[:TOKEN])

    def _greeted(self) -> bool:
        if not self._has_shown(self._token[TOKEN:]):
            return False
        self._begin()
        return True

    def _frame(self, kind: int, body: bytes) -> None:
        if kind == ALIVE:
            return
        if kind != ITEMS:
            raise _GarbageError(f"kind {kind} from a sender")
        (number,) = _NUMBER.unpack_from(body)
        inlets, closed = self._delivered(body)
        for inlet in inlets:
            inlet.on_change()
        if closed:
            self._write(CLOSED, *map(_KEY.pack, closed))
        self._write(ACKNOWLEDGED, _NUMBER.pack(number), *(_KEY.pack(inlet.key) for inlet in inlets if inlet.is_full()))

    def _delivered(self, body: bytes) -> tuple[Iterable[Inlet], Iterable[int]]:
        """Give each item of a frame to its stream; those streams, and the keys of streams that are closed."""
        found: dict[int, Inlet | None] = {}
        at = _NUMBER.size
        while at < len(body):
            key, last, length, noted = _ITEM.unpack_from(body, at)
            at += _ITEM.size
            if at + length + noted > len(body):
                raise _GarbageError("an item that is longer than its frame")
            found[key] = inlet = self._streams.get(key)
            if inlet is not None:
                inlet.take_in(body[at : at + length], body[at + length : at + length + noted], bool(last))
            at += length + noted
        return [inlet for inlet in found.values() if inlet], [key for key, inlet in found.items() if inlet is None]

    def _forget_streams(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for inlet in streams:
            self._loop.call_soon(inlet.on_change)  # one that fails keeps none of the others from hearing of it


class Inlet:
    """A stream at its receiver.

    Attributes:
        key: to tell the sender.
        received: how many items have come.
        ended: the last of them has.
        on_change: called when there is something new: items, or the loss of the link. It must not raise.
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
        """Read no more; idempotent. ``on_change`` is not called again."""
        self._items, self._size = [], 0
        self.on_change = lambda: None
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
        self._connected: dict[Sender, None] = {}  # those that have not shown the token, the oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    async def listen(self, host: str) -> Offer:
        loop = asyncio.get_running_loop()
        path, backlog = "", PENDING // 4  # all that are accepted at once are read before one gives way
        with contextlib.suppress(OSError):  # no directory, or its name is too long
            self._directory = tempfile.mkdtemp(prefix="xvl-")  # mode 0700; not in a thread, which outlives this task
            self._servers.append(await loop.create_unix_server(self._accepted, f"{self._directory}/s", backlog=backlog))
            path = f"{self._directory}/s"
        self._servers.append(await loop.create_server(self._accepted, host, 0, backlog=backlog))
        self._timer = loop.call_later(OFFERED, self.end)
        return Offer(path, host, self._servers[-1].sockets[0].getsockname()[1], self._token.hex())

    def _accepted(self) -> Sender:
        link = Sender(self._token, self._made, self._ended)
        self._connected[link] = None
        if self._is_over:  # it was accepted just before the sockets were closed
            link.close("the offer is over")
        elif len(self._connected) > PENDING:
            next(iter(self._connected)).close("too many connect and do not show the token")
        return link

    def _made(self, link: Sender) -> None:
        del self._connected[link]
        self.end()
        self._on_made(link)

    def _ended(self, link: Sender) -> None:
        if link in self._connected:
            del self._connected[link]
        else:
            self._on_end(link)

    def end(self) -> None:
        """Close the sockets, and what has not shown its token; idempotent."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        for server in self._servers:
            server.close()
        for link in list(self._connected):
            link.close("the offer is over")
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


async def accept(offered: Offer) -> Receiver:
    """Make the link that was offered: by its Unix socket where that is here, else by its address.

    Raises:
        LinkLostError: it cannot be made.
    """
    link = Receiver(bytes.fromhex(offered.token))
    try:
        await asyncio.wait_for(_answered(link, offered), ANSWER)
    except (OSError, asyncio.TimeoutError) as error:
        link.close(str(error) or "there was no answer")
    except BaseException:
        link.close("it is not waited for any more")
        raise
    if link.lost is not None:
        raise LinkLostError(f"No link could be made to {offered.host}:{offered.port}: {link.lost}.")
    return link


async def _answered(link: Receiver, offered: Offer) -> None:
    """Connect, and wait until the peer has shown its half of the token."""
    await _connect(link, offered)
    await asyncio.wait([link.made])


async def _connect(link: Receiver, offered: Offer) -> None:
    loop = asyncio.get_running_loop()
    if offered.path:
        with contextlib.suppress(OSError):  # of another host, or another mount namespace
            await loop.create_unix_connection(lambda: link, offered.path)
            return
    await loop.create_connection(lambda: link, offered.host, offered.port)
