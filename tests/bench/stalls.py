"""How long tokens wait on a push link: from the step that made them until the reader has them.

``tox -e bench -- stalls``: two processes and a real link, no cluster and no engine. Each step makes a token for every
stream, as an engine does; those of a stream that is not ready go together into its next item, as vLLM gathers them. The
clock is that of the whole machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import click

from xinf_vllm_backend.process.link import Inlet, Outlet, Sender, accept, offer

from .launches import say
from .load import percentile
from .report import Samples, figure

STEP = 0.005  # seconds
EVENT = bytes(250)  # about what a token is as a server-sent event
SLOW = 3.0  # seconds between looks of the slow reader, whose stream is paused meanwhile
BOUND = 30.0  # seconds, beyond the measurement
PERCENTILES = {"p50": 0.5, "p99": 0.99, "worst": 1.0}

_MADE = struct.Struct("!d")  # when the oldest token of an item was made


# -- the model process


def _push(end: Connection, seconds: float) -> None:
    asyncio.run(_pushed(end, seconds))


async def _pushed(end: Connection, seconds: float) -> None:
    made: asyncio.Future[Sender] = asyncio.get_running_loop().create_future()
    end.send(await offer("127.0.0.1", made.set_result))
    keys = await asyncio.to_thread(end.recv)
    link = await made
    streams = [_Stream(link.open(key)) for key in keys]
    pumps = [asyncio.ensure_future(stream.pump()) for stream in streams]
    begun = time.monotonic()
    for step in range(round(seconds / STEP)):
        await asyncio.sleep(begun + step * STEP - time.monotonic())
        now = time.monotonic()
        for stream in streams:
            stream.token(now)
    for stream in streams:
        stream.token(None)
    await asyncio.wait_for(asyncio.gather(*pumps), BOUND)


class _Stream:
    """A stream of an engine, and what gathers its tokens."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._made: list[float] = []  # when; of the tokens that wait
        self._is_over = False
        self._changed = asyncio.Event()

    def token(self, made: float | None) -> None:
        """A token was made then; None if it was the last."""
        if made is None:
            self._is_over = True
        else:
            self._made.append(made)
        self._changed.set()

    async def pump(self) -> None:
        while self._made or not self._is_over:
            if self._made:
                self._outlet.put(_MADE.pack(self._made[0]) + EVENT)
                self._made.clear()
                await self._outlet.ready()
            else:
                self._changed.clear()
                await self._changed.wait()
        self._outlet.put(b"", last=True)
        await self._outlet.finish()


# -- the API process


async def _waits(end: Connection, streams: int, has_slow: bool, tcp: bool) -> list[float]:
    """Seconds that each item waited, but those of the slow reader."""
    offered = await asyncio.to_thread(end.recv)
    link = await accept(replace(offered, path="") if tcp else offered)
    inlets = [link.open() for _ in range(streams + has_slow)]
    slow = [_read_slowly(inlet) for inlet in inlets[streams:]]
    readers = [asyncio.ensure_future(each) for each in [*map(_read, inlets[:streams]), *slow]]
    end.send([inlet.key for inlet in inlets])
    found = await asyncio.gather(*readers)
    link.close()
    return [wait for waits in found for wait in waits]


async def _read(inlet: Inlet) -> list[float]:
    """Take what comes as soon as it does."""
    changed = asyncio.Event()
    inlet.on_change = changed.set
    found: list[float] = []
    while not inlet.ended:
        await changed.wait()
        changed.clear()
        taken, now = inlet.take(), time.monotonic()
        found += [now - _MADE.unpack_from(data)[0] for data, _ in taken if data]
        if inlet.lost is not None and not inlet.ended:
            raise click.ClickException(f"the link is lost: {inlet.lost}")
    return found


async def _read_slowly(inlet: Inlet) -> list[float]:
    while not inlet.ended and inlet.lost is None:
        await asyncio.sleep(SLOW)
        inlet.take()
    return []


@contextlib.contextmanager
def _pusher(seconds: float) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_push, args=(theirs, seconds), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.join(BOUND)
        process.kill()


def measure(streams: int, has_slow: bool, tcp: bool, seconds: float) -> list[float]:
    """Seconds that each item of ``streams`` waited."""
    with _pusher(seconds) as end:
        return asyncio.run(asyncio.wait_for(_waits(end, streams, has_slow, tcp), seconds + BOUND))


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often to measure.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement.")
@click.option("--streams", default="1,32,128", show_default=True, help="How many at once.")
@click.option("--tcp", is_flag=True, help="The link as it is across hosts, in place of a Unix socket.")
def main(rounds: int, seconds: float, streams: str, tcp: bool) -> None:
    """Measure how long tokens wait on a push link, a token each 5 ms for each stream; print it as Markdown."""
    samples = Samples()
    cells = [(int(count), has_slow) for count in streams.split(",") for has_slow in (False, True)]
    for number in range(rounds):
        for count, has_slow in cells:
            say(f"{_name(count, has_slow)}, round {number + 1}")
            waits = measure(count, has_slow, tcp, seconds)
            for name, share in PERCENTILES.items():
                samples.add(_name(count, has_slow), name, 1000 * percentile(waits, share))
    click.echo("| | " + " | ".join(PERCENTILES) + " |\n" + "|--" * (len(PERCENTILES) + 1) + "|")
    for cell in cells:
        figures = [figure(samples.of(_name(*cell), name), "ms") for name in PERCENTILES]
        click.echo("| " + " | ".join([_name(*cell), *figures]) + " |")


def _name(streams: int, has_slow: bool) -> str:
    return f"{streams} stream{'s' * (streams > 1)}{', and a slow reader' * has_slow}"


if __name__ == "__main__":
    main()
