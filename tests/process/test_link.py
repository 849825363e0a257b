"""A push link keeps order and bounds, and says of each item whether it arrived; no peer can hang or flood it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from link_sender import push_until_lost
from process_helpers import TIMEOUT, becomes, exit_code, plain, receive

from xinf_vllm_backend.process import link as module
from xinf_vllm_backend.process.link import (
    ACKNOWLEDGED,
    ALIVE,
    BEAT,
    CLOSED,
    HELLO,
    HIGH,
    ITEMS,
    RESUMED,
    SILENCE,
    STUCK,
    TOKEN,
    Inlet,
    LinkLostError,
    Offer,
    Outlet,
    Receiver,
    Sender,
    accept,
    offer,
)

T = TypeVar("T")
HOST = "127.0.0.1"
CLOSED_BY_PEER = re.compile("the (peer closed the connection|connection was closed: )")
GARBAGE = "the peer sent what is no frame: "

# Timers of asyncio's own loop follow its clock, which a test can move; those of uvloop do not.
moves_the_clock = pytest.mark.asyncio(loop_factories=["asyncio"])


class Peer:
    """One end, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, kind: int, body: bytes = b"") -> None:
        self.writer.write(frame(kind, body))

    async def read(self, size: int) -> bytes:
        return await soon(self.reader.readexactly(size))

    async def any_frame(self) -> tuple[int, bytes]:
        kind, length = struct.unpack("!BI", await self.read(5))
        return kind, await self.read(length)

    async def frame(self) -> tuple[int, bytes]:
        """The next that is no heartbeat."""
        kind = ALIVE
        while kind == ALIVE:
            kind, body = await self.any_frame()
        return kind, body

    async def items(self) -> tuple[int, list[tuple[int, bytes]]]:
        """Number of the next frame, and key and data of each of its items."""
        kind, body = await self.frame()
        assert kind == ITEMS
        return struct.unpack_from("!I", body)[0], list(unpacked(body))

    async def beats(self, count: int) -> None:
        """Nothing else comes meanwhile."""
        for _ in range(count):
            assert (await self.any_frame())[0] == ALIVE

    async def rest(self) -> bytes:
        """What comes until the link is closed."""
        try:
            return await soon(self.reader.read())
        except ConnectionResetError:
            return b""


def frame(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("!BI", kind, len(body)) + body


def number(value: int) -> bytes:
    return struct.pack("!I", value)


def keys(*values: int) -> bytes:
    return struct.pack(f"!{len(values)}Q", *values)


def item(key: int, data: bytes, note: bytes = b"", last: bool = False) -> bytes:
    return struct.pack("!QBII", key, last, len(data), len(note)) + data + note


def unpacked(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 4
    while at < len(body):
        key, _, length, noted = struct.unpack_from("!QBII", body, at)
        yield key, body[at + 17 : at + 17 + length]
        at += 17 + length + noted


async def soon(awaited: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaited, TIMEOUT)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        await asyncio.sleep(0)


class Links:
    """Links of a test, and what their offers told."""

    def __init__(self) -> None:
        self.made: asyncio.Queue[Sender] = asyncio.Queue()
        self.ended: list[Sender] = []
        self._ends: list[Sender | Receiver] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def offer(self, host: str = HOST) -> Offer:
        return await offer(host, self._take, self.ended.append)

    def _take(self, sender: Sender) -> None:
        self._ends.append(sender)
        self.made.put_nowait(sender)

    async def accept(self, offered: Offer) -> tuple[Sender, Receiver]:
        receiver = await soon(accept(offered))
        self._ends.append(receiver)
        return await soon(self.made.get()), receiver

    async def pair(self) -> tuple[Sender, Receiver]:
        return await self.accept(await self.offer())

    async def stranger(self, offered: Offer, tcp: bool = False) -> Peer:
        """One that has connected and said nothing."""
        reader, writer = await soon(
            asyncio.open_connection(HOST, offered.port) if tcp else asyncio.open_unix_connection(offered.path)
        )
        self._writers.append(writer)
        return Peer(reader, writer)

    async def sender(self) -> tuple[Sender, Peer]:
        """A sender, and its receiver by hand."""
        offered = await self.offer()
        peer = await self.stranger(offered)
        peer.writer.write(greeting(offered, 0))
        sender = await soon(self.made.get())
        assert await peer.read(len(HELLO) + TOKEN) == greeting(offered, 1)
        return sender, peer

    async def receiver(self) -> tuple[Receiver, Peer]:
        """A receiver, and its sender by hand."""
        async with self.offer_by_hand() as (offered, connected):
            accepting = asyncio.ensure_future(accept(offered))
            peer = await soon(connected.get())
            assert await peer.read(len(HELLO) + TOKEN) == greeting(offered, 0)
            peer.writer.write(greeting(offered, 1))
            receiver = await soon(accepting)
            self._ends.append(receiver)
            return receiver, peer

    @contextlib.asynccontextmanager
    async def offer_by_hand(self) -> AsyncIterator[tuple[Offer, asyncio.Queue[Peer]]]:
        connected: asyncio.Queue[Peer] = asyncio.Queue()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.append(writer)
            connected.put_nowait(Peer(reader, writer))

        server = await asyncio.start_server(take, HOST, 0)
        yield Offer("", HOST, server.sockets[0].getsockname()[1], os.urandom(2 * TOKEN).hex()), connected
        server.close()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for writer in self._writers:
            writer.transport.abort()


def greeting(offered: Offer, half: int) -> bytes:
    token = bytes.fromhex(offered.token)
    return HELLO + (token[TOKEN:] if half else token[:TOKEN])


def sockets() -> int:
    """How many are open; loops open other files when they need them, and keep them."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(name.startswith("socket:") for name in found)


def has_timers(loop: Any) -> bool:
    return any(not timer.cancelled() for timer in getattr(loop, "_scheduled", ()))


@pytest.fixture
async def links(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Links]:
    """Nothing is left of them: no file, no socket, no task, no timer."""
    with tempfile.TemporaryDirectory(prefix="l") as directory:  # that of pytest may be too long for a socket
        monkeypatch.setattr(tempfile, "tempdir", directory)
        before = sockets()
        links = Links()
        yield links
        links.close()
        await until(lambda: not os.listdir(directory))
        await until(lambda: sockets() <= before)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not has_timers(asyncio.get_running_loop())


class Clock:
    """The loop's, which a test can move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real = loop.time
        self.ahead = 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.ahead)

    def move(self, seconds: float) -> None:
        self.ahead += seconds

    async def move_until(self, condition: Callable[[], object], step: float) -> None:
        def moved() -> object:
            self.move(step)
            return condition()

        await until(moved)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Reader:
    """Takes what comes, at once."""

    def __init__(self, inlet: Inlet) -> None:
        self.inlet = inlet
        self.items: list[tuple[bytes, bytes]] = []
        self.changes = 0
        self._lost = asyncio.Event()
        inlet.on_change = self._take

    def _take(self) -> None:
        self.changes += 1
        self.items += self.inlet.take()
        if self.inlet.lost is not None:
            self._lost.set()

    async def loss(self) -> str | None:
        """Why the link is lost, once the stream is told of it."""
        await soon(self._lost.wait())
        return self.inlet.lost


async def push(outlet: Outlet, items: list[tuple[bytes, bytes]]) -> None:
    for count, (data, note) in enumerate(items, 1):
        await outlet.ready()
        outlet.put(data, note, last=count == len(items))
    await outlet.finish()


async def push_all(sender: Sender, streams: dict[int, list[tuple[bytes, bytes]]]) -> list[Outlet]:
    outlets = [sender.open(key) for key in streams]
    await soon(asyncio.gather(*map(push, outlets, streams.values())))
    return outlets


def random_items(seed: int, count: int) -> list[tuple[bytes, bytes]]:
    chance = random.Random(seed)
    sizes = [(chance.choice((0, 1, 50, 300)), chance.choice((0, 12))) for _ in range(count)]
    return [(chance.randbytes(length), chance.randbytes(noted)) for length, noted in sizes]


def numbered(count: int) -> list[tuple[bytes, bytes]]:
    return [(b"%d" % at, b"") for at in range(count)]


class TestTheItemsOfALink:
    async def test_come_whole_and_in_order_in_each_of_many_streams(self, links: Links) -> None:
        sender, receiver = await links.pair()
        readers = [Reader(receiver.open()) for _ in range(20)]
        sent = {reader.inlet.key: random_items(seed, 50) for seed, reader in enumerate(readers)}
        outlets = await push_all(sender, sent)
        assert [reader.items for reader in readers] == list(sent.values())
        assert all(reader.inlet.ended and reader.inlet.received == 50 for reader in readers)
        assert [outlet.acknowledged for outlet in outlets] == [50] * 20

    async def test_may_be_of_many_megabytes(self, links: Links) -> None:
        sender, receiver = await links.pair()
        reader = Reader(receiver.open())
        sent = [(os.urandom(5 << 20), b""), (b"", os.urandom(3 << 20)), (b"small", b"note")]
        await push_all(sender, {reader.inlet.key: sent})
        assert reader.items == sent

    async def test_of_a_thousand_streams_come(self, links: Links) -> None:
        sender, receiver = await links.pair()
        readers = [Reader(receiver.open()) for _ in range(1000)]
        sent = numbered(10)
        await push_all(sender, {reader.inlet.key: sent for reader in readers})
        assert all(reader.items == sent and reader.inlet.ended for reader in readers)

    async def test_that_are_put_before_the_stream_is_closed_still_come(self, links: Links) -> None:
        sender, receiver = await links.pair()
        reader = Reader(receiver.open())
        outlet = sender.open(reader.inlet.key)
        outlet.put(b"first", last=True)
        outlet.close()
        outlet.close()
        outlet.put(b"dropped")
        await until(lambda: reader.inlet.ended)
        await until(lambda: outlet.acknowledged)
        assert reader.items == [(b"first", b"")]

    async def test_that_fit_in_no_frame_are_refused(self, links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_FRAME", 100)
        sender, receiver = await links.pair()
        reader = Reader(receiver.open())
        outlet = sender.open(reader.inlet.key)
        with pytest.raises(ValueError, match="80 bytes does not fit in a frame of 100"):
            outlet.put(bytes(50), bytes(30))
        await soon(push(outlet, [(bytes(50), bytes(29))]))
        assert reader.items == [(bytes(50), bytes(29))]


class TestAFrame:
    async def test_takes_all_that_is_put_in_a_turn_of_the_loop(self, links: Links) -> None:
        sender, peer = await links.sender()
        outlets = [sender.open(key) for key in (7, 8, 9)]
        for outlet in outlets:
            outlet.put(b"a")
        outlets[0].put(b"b")
        assert await peer.items() == (1, [(7, b"a"), (8, b"a"), (9, b"a"), (7, b"b")])

    async def test_is_the_only_one_that_is_not_acknowledged(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BEAT", 0.005)
        sender, peer = await links.sender()
        one, other = sender.open(1), sender.open(2)
        one.put(b"a")
        assert await peer.items() == (1, [(1, b"a")])
        await soon(one.ready())
        one.put(b"b")
        await peer.beats(2)
        other.put(b"c")
        await peer.beats(3)
        assert (one.acknowledged, other.acknowledged) == (0, 0)
        peer.send(ACKNOWLEDGED, number(1))
        assert await peer.items() == (2, [(1, b"b"), (2, b"c")])
        assert (one.acknowledged, other.acknowledged) == (1, 0)
        peer.send(ACKNOWLEDGED, number(2))
        await soon(asyncio.gather(one.finish(), other.finish()))
        assert (one.acknowledged, other.acknowledged) == (2, 1)

    async def test_is_no_larger_than_the_receiver_allows(self, links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_FRAME", 100)
        sender, receiver = await links.pair()
        readers = [Reader(receiver.open()) for _ in range(20)]
        sent = [(b"%030d" % at, b"") for at in range(5)]
        outlets = await push_all(sender, {reader.inlet.key: sent for reader in readers})
        assert [reader.items for reader in readers] == [sent] * 20
        assert [outlet.acknowledged for outlet in outlets] == [5] * 20

    async def test_that_does_not_fit_leaves_the_rest_for_the_next(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_FRAME", 4 + 2 * 27)
        sender, peer = await links.sender()
        outlet = sender.open(1)
        for at in range(3):
            outlet.put(b"%010d" % at)
        assert (await peer.items())[1] == [(1, b"0000000000"), (1, b"0000000001")]
        peer.send(ACKNOWLEDGED, number(1))
        assert (await peer.items())[1] == [(1, b"0000000002")]
        assert outlet.acknowledged == 2
        peer.send(ACKNOWLEDGED, number(2))
        await soon(outlet.finish())
        assert outlet.acknowledged == 3


class TestALinkThatIsCut:
    async def test_anywhere_gives_its_receiver_whole_frames_and_tells_it(self, links: Links) -> None:
        length = len(frame(ITEMS, number(1) + item(0, b"ab", b"c") + item(0, b"d")))
        for cut in range(2 * length + 1):
            receiver, peer = await links.receiver()
            reader = Reader(receiver.open())
            body = item(reader.inlet.key, b"ab", b"c") + item(reader.inlet.key, b"d")
            peer.writer.write((frame(ITEMS, number(1) + body) + frame(ITEMS, number(2) + body))[:cut])
            peer.writer.close()
            assert CLOSED_BY_PEER.search(str(await reader.loss()))
            assert reader.items == [(b"ab", b"c"), (b"d", b"")] * (cut // length)
            assert reader.changes == cut // length + 1

    async def test_anywhere_tells_its_sender_what_had_arrived(self, links: Links) -> None:
        answer = frame(ALIVE) + frame(ACKNOWLEDGED, number(1) + keys(5)) + frame(RESUMED, keys(5))
        acknowledged_at = len(frame(ALIVE) + frame(ACKNOWLEDGED, number(1) + keys(5)))
        for cut in range(len(answer) + 1):
            sender, peer = await links.sender()
            outlet = sender.open(5)
            outlet.put(b"a")
            assert await peer.items() == (1, [(5, b"a")])
            outlet.put(b"b")
            peer.writer.write(answer[:cut])
            peer.writer.close()
            with pytest.raises(LinkLostError, match=CLOSED_BY_PEER):
                await soon(outlet.finish())
            assert outlet.acknowledged == (cut >= acknowledged_at)
            assert sender in links.ended

    @pytest.mark.parametrize("cut", [0, 1, len(HELLO), len(HELLO) + TOKEN - 1])
    async def test_in_the_greeting_is_not_made(self, links: Links, cut: int) -> None:
        async with links.offer_by_hand() as (offered, connected):
            accepting = asyncio.ensure_future(accept(offered))
            peer = await soon(connected.get())
            peer.writer.write(greeting(offered, 1)[:cut])
            peer.writer.close()
            with pytest.raises(LinkLostError, match="No link could be made to "):
                await soon(accepting)
        offered = await links.offer()
        stranger = await links.stranger(offered)
        stranger.writer.write(greeting(offered, 0)[:cut])
        stranger.writer.close()
        await links.accept(offered)
        assert links.ended == []

    async def test_here_wakes_all_that_wait_and_takes_no_more(self, links: Links) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        outlet.put(b"b")
        waiting = [asyncio.ensure_future(wait()) for wait in (outlet.ready, outlet.finish, outlet.ready)]
        await asyncio.sleep(0)
        sender.close("enough")
        sender.close("again")
        assert {str(error) for error in await soon(asyncio.gather(*waiting, return_exceptions=True))} == {
            "The link is lost: enough."
        }
        outlet.put(b"c")
        with pytest.raises(LinkLostError, match="enough"):
            sender.open(2)
        assert links.ended == [sender]
        assert await peer.rest() == b""

    async def test_tells_every_reader_even_if_one_of_them_fails(self, links: Links) -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))
        receiver, peer = await links.receiver()
        failing, reader = receiver.open(), Reader(receiver.open())
        failing.on_change = lambda: failing.take()[0]  # type: ignore[assignment]
        receiver.close()
        await until(lambda: reader.changes == 1)
        assert [type(failure) for failure in failures] == [IndexError]
        assert await peer.rest() == b""
        with pytest.raises(LinkLostError, match="it was closed"):
            receiver.open()

    async def test_in_the_middle_of_the_work_knows_exactly_what_arrived(self, links: Links) -> None:
        sender, receiver = await links.pair()
        inlets = [receiver.open() for _ in range(10)]
        outlets = [sender.open(inlet.key) for inlet in inlets]

        def check(at: int) -> None:
            inlets[at].take()
            assert 0 <= inlets[at].received - outlets[at].acknowledged <= 1
            if inlets[at].received == 100:
                receiver.close()

        for at, inlet in enumerate(inlets):
            inlet.on_change = lambda at=at: check(at)  # type: ignore[misc]
        pushed = await soon(
            asyncio.gather(*(push(outlet, numbered(500)) for outlet in outlets), return_exceptions=True)
        )
        assert {type(error) for error in pushed} == {LinkLostError}
        for inlet, outlet in zip(inlets, outlets, strict=True):
            assert 99 <= inlet.received <= 100
            assert 0 <= inlet.received - outlet.acknowledged <= 1


WRONG = {
    "unknown_kind": frame(6),
    "kind_zero": frame(0),
    "too_long": struct.pack("!BI", ITEMS, module.MAX_FRAME + 1),
    "noise": b"\xff" + random.Random(1).randbytes(5000),
    "text": b"GET / HTTP/1.1\r\n\r\n",
}
WRONG_FOR_A_RECEIVER = {
    "no_number": frame(ITEMS, b"abc"),
    "item_longer_than_its_frame": frame(ITEMS, number(1) + item(1, b"abc")[:-1]),
    "note_longer_than_its_frame": frame(ITEMS, number(1) + item(1, b"", b"abc")[:-1]),
    "item_without_its_head": frame(ITEMS, number(1) + item(1, b"")[:-1]),
    "acknowledged": frame(ACKNOWLEDGED, number(1)),
    "resumed": frame(RESUMED, keys(1)),
}
WRONG_FOR_A_SENDER = {
    "wrong_number": frame(ACKNOWLEDGED, number(2)),
    "acknowledged_twice": frame(ACKNOWLEDGED, number(1)) * 3,
    "no_number": frame(ACKNOWLEDGED),
    "part_of_a_key": frame(ACKNOWLEDGED, number(1) + keys(1)[:-1]),
    "resumed_part_of_a_key": frame(RESUMED, keys(1)[:-1]),
    "closed_part_of_a_key": frame(CLOSED, keys(1) + b"a"),
    "items": frame(ITEMS, number(1)),
}


def named(cases: dict[str, bytes]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("garbage", cases.values(), ids=cases)


class TestGarbage:
    @named(WRONG | WRONG_FOR_A_RECEIVER)
    async def test_ends_a_receiver_and_tells_its_streams(self, links: Links, garbage: bytes) -> None:
        receiver, peer = await links.receiver()
        reader = Reader(receiver.open())
        peer.writer.write(garbage)
        await until(lambda: reader.changes == 1)
        assert reader.inlet.lost is not None
        assert reader.inlet.lost.startswith(GARBAGE)
        assert await peer.rest() == b""

    @named(WRONG | WRONG_FOR_A_SENDER)
    async def test_ends_a_sender_and_tells_its_streams(self, links: Links, garbage: bytes) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        outlet.put(b"b")
        peer.writer.write(garbage)
        with pytest.raises(LinkLostError, match=f"The link is lost: {GARBAGE}"):
            await soon(asyncio.gather(outlet.ready(), outlet.finish()))
        assert links.ended == [sender]

    async def test_right_behind_the_token_ends_a_link_after_it_was_told_of(self, links: Links) -> None:
        offered = await links.offer()
        peer = await links.stranger(offered)
        peer.writer.write(greeting(offered, 0) + frame(9))
        sender = await soon(links.made.get())
        await until(lambda: links.ended == [sender])
        assert sender.lost is not None


class TestAToken:
    @pytest.mark.parametrize("tcp", [False, True])
    async def test_that_is_wrong_gets_no_answer_and_leaves_the_offer_open(self, links: Links, tcp: bool) -> None:
        offered = await links.offer()
        for wrong in (HELLO + bytes(TOKEN), greeting(offered, 1), b"\0" * 10000):
            stranger = await links.stranger(offered, tcp)
            stranger.writer.write(wrong)
            assert await stranger.rest() == b""
        await links.accept(offered)
        assert links.made.empty()
        assert links.ended == []

    async def test_is_not_waited_for_to_the_cost_of_the_right_peer(self, links: Links) -> None:
        offered = await links.offer()
        strangers = [await links.stranger(offered, tcp) for tcp in (False, True)]
        strangers[1].writer.write(greeting(offered, 0)[:-1])
        await links.accept(offered)
        for stranger in strangers:
            assert await stranger.rest() == b""
        assert links.ended == []

    async def test_is_asked_of_the_sender_too(self, links: Links) -> None:
        async with links.offer_by_hand() as (offered, connected):
            accepting = asyncio.ensure_future(accept(offered))
            peer = await soon(connected.get())
            peer.writer.write(greeting(offered, 0))
            with pytest.raises(LinkLostError, match="the peer has not the token"):
                await soon(accepting)
            assert await peer.rest() in (b"", greeting(offered, 0))

    async def test_stands_in_no_log(self, links: Links) -> None:
        offered = await links.offer()
        assert offered.token not in repr(offered)
        await links.accept(offered)


class TestAnOffer:
    async def test_is_taken_once(self, links: Links) -> None:
        offered = await links.offer()
        peers = [await links.stranger(offered, tcp=at % 2 == 1) for at in range(10)]
        for peer in peers:
            peer.writer.write(greeting(offered, 0))
        sender = await soon(links.made.get())
        assert links.made.empty()
        sender.close()
        answers = [await peer.rest() for peer in peers]
        assert sorted(answers)[:-1] == [b""] * 9
        assert sorted(answers)[-1] in (b"", greeting(offered, 1))
        with pytest.raises(LinkLostError, match=f"No link could be made to {HOST}:{offered.port}: "):
            await soon(accept(offered))
        assert links.ended == [sender]

    async def test_lasts_only_so_long_and_leaves_nothing(self, links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "OFFERED", 0.1)
        before = sockets()
        offered = await links.offer()
        with socket.create_connection((HOST, offered.port)) as stranger:
            stranger.settimeout(TIMEOUT)
            await until(lambda: not os.listdir(tempfile.gettempdir()))
            assert await asyncio.to_thread(stranger.recv, 1) == b""
        await until(lambda: sockets() <= before)
        with pytest.raises(LinkLostError):
            await soon(accept(offered))
        assert links.ended == []

    async def test_is_private_and_leaves_no_socket_once_it_is_taken(self, links: Links) -> None:
        offered = await links.offer()
        assert stat.S_IMODE(os.stat(os.path.dirname(offered.path)).st_mode) == 0o700
        await links.accept(offered)
        assert os.listdir(tempfile.gettempdir()) == []

    async def test_is_taken_by_its_unix_socket_where_that_is(self, links: Links) -> None:
        await links.accept(replace(await links.offer(), port=1))

    async def test_is_taken_by_its_address_where_the_path_is_not(self, links: Links) -> None:
        offered = await links.offer()
        shutil.rmtree(os.path.dirname(offered.path))
        sender, receiver = await links.accept(offered)
        reader = Reader(receiver.open())
        await push_all(sender, {reader.inlet.key: numbered(10)})
        assert reader.items == numbered(10)

    async def test_is_made_of_an_address_alone_where_the_path_is_too_long(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = Path(tempfile.gettempdir()) / ("x" * 120)
        directory.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(directory))
            offered = await links.offer()
        assert offered.path == ""
        await links.accept(offered)
        directory.rmdir()

    async def test_that_cannot_be_made_leaves_nothing(self, links: Links) -> None:
        with pytest.raises(OSError, match=r"192\.0\.2\.1"):
            await links.offer("192.0.2.1")  # reserved for documentation

    async def test_is_not_held_by_those_that_connect_and_say_nothing(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PENDING", 8)
        offered = await links.offer()
        strangers = [await links.stranger(offered, tcp=True) for _ in range(30)]
        for stranger in strangers[:-8]:
            assert await stranger.rest() == b""
        assert not any(stranger.reader.at_eof() for stranger in strangers[-8:])
        await links.accept(offered)
        assert links.ended == []

    async def test_that_is_over_closes_what_connects_just_then(self, links: Links) -> None:
        async with links.offer_by_hand() as (offered, connected):
            for late in (Receiver(bytes(32)), Sender(bytes(32), links.ended.append, links.ended.append)):
                late.close()
                await asyncio.get_running_loop().create_connection(lambda late=late: late, HOST, offered.port)  # type: ignore[misc]
                assert await (await soon(connected.get())).rest() in (b"", HELLO + bytes(TOKEN))

    async def test_without_an_answer_is_not_waited_for(self, links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "ANSWER", 0.1)
        async with links.offer_by_hand() as (offered, connected):
            with pytest.raises(LinkLostError, match="there was no answer"):
                await soon(accept(offered))
            assert await (await soon(connected.get())).rest() in (b"", greeting(offered, 0))

    async def test_that_is_no_longer_waited_for_is_closed(self, links: Links) -> None:
        async with links.offer_by_hand() as (offered, connected):
            accepting = asyncio.ensure_future(accept(offered))
            peer = await soon(connected.get())
            assert await peer.read(len(HELLO) + TOKEN) == greeting(offered, 0)
            accepting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(accepting)
            assert await peer.rest() == b""


class TestAPeerThatSaysNothing:
    @moves_the_clock
    async def test_is_given_up_after_a_while_by_a_sender(self, links: Links, clock: Clock) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        for _ in range(int(SILENCE / BEAT) - 1):
            clock.move(BEAT)
            await peer.beats(1)
        assert sender.lost is None
        await clock.move_until(lambda: sender.lost, BEAT)
        with pytest.raises(LinkLostError, match=r"the peer was silent for 1\d s"):
            await soon(outlet.finish())

    @moves_the_clock
    async def test_is_given_up_after_a_while_by_a_receiver(self, links: Links, clock: Clock) -> None:
        receiver, _ = await links.receiver()
        reader = Reader(receiver.open())
        await clock.move_until(lambda: receiver.lost, BEAT / 2)
        assert "the peer was silent for 1" in str(await reader.loss())
        assert SILENCE < clock.ahead < 2 * SILENCE

    @moves_the_clock
    async def test_but_that_it_is_alive_is_kept_and_nothing_piles_up(self, links: Links, clock: Clock) -> None:
        sender, peer = await links.sender()
        outlets = [sender.open(key) for key in range(3)]
        counts = [0, 0, 0]

        async def push_on(at: int) -> None:
            while True:
                await outlets[at].ready()
                outlets[at].put(b"a")
                counts[at] += 1

        pushing = asyncio.gather(*map(push_on, range(3)))
        assert len((await peer.items())[1]) == 3
        for _ in range(int(STUCK / BEAT) - 1):
            peer.send(ALIVE)
            clock.move(BEAT)
            await peer.beats(1)
        assert counts == [2, 2, 2]  # one in flight, and one that waits
        peer.send(ACKNOWLEDGED, number(1))
        assert len((await peer.items())[1]) == 3
        sender.close()
        with pytest.raises(LinkLostError):
            await soon(pushing)

    @moves_the_clock
    async def test_but_that_it_is_alive_is_given_up_in_the_end(self, links: Links, clock: Clock) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        while sender.lost is None:
            peer.send(ALIVE)
            clock.move(BEAT)
            await asyncio.sleep(0.001)
        assert "has not acknowledged a frame for 60 s" in sender.lost
        assert STUCK < clock.ahead < STUCK + 3 * BEAT
        with pytest.raises(LinkLostError):
            await soon(outlet.finish())

    @moves_the_clock
    async def test_while_we_slept_is_heard_first(self, links: Links, clock: Clock) -> None:
        receiver, peer = await links.receiver()
        clock.move(10 * SILENCE)
        await peer.beats(1)
        assert receiver.lost is None
        peer.send(ALIVE)
        clock.move(BEAT)
        await peer.beats(1)
        assert receiver.lost is None
        clock.move(10 * SILENCE)
        await peer.beats(1)
        await clock.move_until(lambda: receiver.lost, 3 * BEAT)

    async def test_keeps_two_idle_ends_alive_by_heartbeats_alone(
        self, links: Links, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BEAT", 0.005)
        sender, one = await links.sender()
        receiver, other = await links.receiver()
        await asyncio.gather(one.beats(5), other.beats(5))
        assert (sender.lost, receiver.lost) == (None, None)


class TestASlowReader:
    async def test_stops_its_own_stream_and_no_other_and_goes_on(self, links: Links) -> None:
        sender, receiver = await links.pair()
        slow, readers = receiver.open(), [Reader(receiver.open()) for _ in range(5)]
        items = [(b"%010000d" % at, b"") for at in range(50)]
        pushing = asyncio.ensure_future(push(outlet := sender.open(slow.key), items))
        await push_all(sender, {reader.inlet.key: numbered(300) for reader in readers})
        assert all(reader.items == numbered(300) for reader in readers)
        assert outlet.paused
        assert HIGH < 10000 * slow.received <= HIGH + 30000
        taken = slow.take()
        while not pushing.done() or len(taken) < 50:
            taken += slow.take()
            await asyncio.sleep(0)
        await soon(pushing)
        assert taken == items
        assert (slow.received, outlet.acknowledged) == (50, 50)

    async def test_among_a_thousand_stops_none_of_them(self, links: Links) -> None:
        sender, receiver = await links.pair()
        slow = [receiver.open() for _ in range(20)]
        readers = [Reader(receiver.open()) for _ in range(980)]
        pushing = [asyncio.ensure_future(push(sender.open(inlet.key), [(bytes(HIGH), b"")] * 10)) for inlet in slow]
        await push_all(sender, {reader.inlet.key: numbered(5) for reader in readers})
        assert all(inlet.received <= 3 for inlet in slow)
        for inlet in slow:
            Reader(inlet)
            inlet.on_change()
        await soon(asyncio.gather(*pushing))
        assert all(inlet.received == 10 and inlet.ended for inlet in slow)

    async def test_is_named_with_the_acknowledgement_and_again_when_it_has_taken(self, links: Links) -> None:
        receiver, peer = await links.receiver()
        inlet = receiver.open()
        peer.send(ITEMS, number(1) + item(inlet.key, bytes(HIGH)))
        assert await peer.frame() == (ACKNOWLEDGED, number(1))
        peer.send(ITEMS, number(2) + item(inlet.key, b"", b"a"))
        assert await peer.frame() == (ACKNOWLEDGED, number(2) + keys(inlet.key))
        peer.send(ITEMS, number(3) + item(inlet.key, b""))
        assert await peer.frame() == (ACKNOWLEDGED, number(3) + keys(inlet.key))
        assert len(inlet.take()) == 3
        assert inlet.take() == []
        assert await peer.frame() == (RESUMED, keys(inlet.key))
        peer.send(ITEMS, number(4) + item(inlet.key, b"b"))
        assert await peer.frame() == (ACKNOWLEDGED, number(4))

    async def test_is_waited_for_until_it_goes_on(self, links: Links) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        peer.send(ACKNOWLEDGED, number(1) + keys(1, 99))
        await soon(outlet.finish())
        waiting = [asyncio.ensure_future(outlet.ready()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        peer.send(RESUMED, keys(1, 99))
        await soon(asyncio.gather(*waiting[1:]))
        assert not outlet.paused


class TestAStreamThatIsClosed:
    async def test_by_its_reader_is_abandoned_and_sends_no_more(self, links: Links) -> None:
        sender, receiver = await links.pair()
        reader, other = Reader(receiver.open()), Reader(receiver.open())
        outlet = sender.open(reader.inlet.key)
        outlet.put(b"a")
        await soon(outlet.finish())
        reader.inlet.close()
        reader.inlet.close()
        await until(lambda: outlet.abandoned)
        for _ in range(100):
            await soon(outlet.ready())
            outlet.put(bytes(1000))
        await soon(outlet.finish())
        await push_all(sender, {other.inlet.key: numbered(10)})
        assert (outlet.acknowledged, reader.inlet.received, reader.changes) == (1, 1, 1)
        assert other.items == numbered(10)

    async def test_before_the_sender_opens_it_is_abandoned_with_the_first_item(self, links: Links) -> None:
        sender, receiver = await links.pair()
        closed, other = receiver.open(), Reader(receiver.open())
        closed.close()
        await push_all(sender, {other.inlet.key: numbered(10)})  # what was said of it has come
        outlet = sender.open(closed.key)
        outlet.put(b"a")
        await until(lambda: outlet.abandoned)
        assert (closed.received, closed.take()) == (0, [])

    async def test_while_items_are_on_the_way_drops_them(self, links: Links) -> None:
        receiver, peer = await links.receiver()
        inlet, other = receiver.open(), Reader(receiver.open())
        inlet.close()
        assert await peer.frame() == (CLOSED, keys(inlet.key))
        peer.send(ITEMS, number(1) + item(inlet.key, b"a") * 2 + item(other.inlet.key, b"b"))
        assert await peer.frame() == (CLOSED, keys(inlet.key))
        assert await peer.frame() == (ACKNOWLEDGED, number(1))
        assert (inlet.take(), other.items) == ([], [(b"b", b"")])

    async def test_by_another_in_the_same_frame_is_not_called_again(self, links: Links) -> None:
        receiver, peer = await links.receiver()
        inlet, other = receiver.open(), Reader(receiver.open())
        inlet.on_change = other.inlet.close
        peer.send(ITEMS, number(1) + item(inlet.key, b"a") + item(other.inlet.key, bytes(2 * HIGH)))
        assert await peer.frame() == (CLOSED, keys(other.inlet.key))
        assert await peer.frame() == (ACKNOWLEDGED, number(1))
        assert (other.changes, other.inlet.take()) == (0, [])

    async def test_after_its_end_says_nothing(self, links: Links) -> None:
        receiver, peer = await links.receiver()
        inlet, other = receiver.open(), receiver.open()
        peer.send(ITEMS, number(1) + item(inlet.key, b"a", last=True))
        assert await peer.frame() == (ACKNOWLEDGED, number(1))
        inlet.close()
        other.close()
        assert await peer.frame() == (CLOSED, keys(other.key))

    async def test_by_its_sender_keeps_nobody_waiting(self, links: Links) -> None:
        sender, peer = await links.sender()
        outlet = sender.open(1)
        outlet.put(b"a")
        await peer.items()
        waiting = asyncio.ensure_future(outlet.finish())
        await asyncio.sleep(0)
        outlet.close()
        await soon(waiting)


class TestALinkThatIsMadeAgain:
    async def test_works_and_knows_no_key_of_the_one_before(self, links: Links) -> None:
        _, receiver = await links.pair()
        old = [receiver.open() for _ in range(100)]
        receiver.close()
        await until(lambda: links.ended)
        sender, receiver = await links.pair()
        readers = [Reader(receiver.open()) for _ in range(100)]
        outlet = sender.open(old[0].key)
        outlet.put(b"of the link before")
        await push_all(sender, {reader.inlet.key: numbered(3) for reader in readers})
        assert [reader.items for reader in readers] == [numbered(3)] * 100
        await until(lambda: outlet.abandoned)
        assert old[0].take() == []


class TestASenderInAnotherProcess:
    @pytest.fixture
    def child(self) -> Iterator[tuple[Any, Connection]]:
        near, far = Pipe()
        process = plain.Process(target=push_until_lost, args=(far,))
        process.start()
        far.close()
        yield process, near
        near.close()
        process.kill()
        exit_code(process)

    async def _read_from(self, end: Connection) -> tuple[Receiver, Reader]:
        receiver = await soon(accept(await asyncio.to_thread(receive, end)))
        reader = Reader(receiver.open())
        end.send(reader.inlet.key)
        await until(lambda: len(reader.items) > 100)
        return receiver, reader

    async def test_that_is_killed_is_missed_at_once(self, child: tuple[Any, Connection]) -> None:
        process, end = child
        _, reader = await self._read_from(end)
        process.kill()
        await until(lambda: reader.inlet.lost)
        assert CLOSED_BY_PEER.search(str(reader.inlet.lost))
        assert reader.items == numbered(reader.inlet.received)

    @moves_the_clock
    async def test_that_is_stopped_is_given_up_and_knows_afterwards_what_arrived(
        self, child: tuple[Any, Connection], clock: Clock
    ) -> None:
        process, end = child
        _, reader = await self._read_from(end)
        os.kill(process.pid, signal.SIGSTOP)
        assert becomes(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        await clock.move_until(lambda: reader.inlet.lost, BEAT)
        assert "the peer was silent for " in str(reader.inlet.lost)
        os.kill(process.pid, signal.SIGCONT)
        error, acknowledged = await asyncio.to_thread(receive, end)
        assert error.startswith("The link is lost: the ")
        assert 0 <= reader.inlet.received - acknowledged <= 1
        assert reader.items == numbered(reader.inlet.received)
