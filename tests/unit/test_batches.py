"""Pooling requests that go to the engine together."""

from __future__ import annotations

import asyncio

import pytest

from xinf_vllm_backend.engine.batches import AT_ONCE, Batches
from xinf_vllm_backend.engine.journal import Entry, Journal


class Engine:
    """Takes requests, and ends them when it is told to."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.batches = Batches(self.journal, self._send)
        self.sent: list[list[str]] = []
        self.there = True
        self._count = 0

    async def _send(self, entry: Entry) -> None:
        if not self.there or entry not in self.journal:
            return
        entry.sent()
        self.sent[-1].append(entry.id)

    async def ask(self, *names: str) -> list[Entry]:
        entries = [self.journal.open(name, name, None) for name in names]
        self.sent.append([])
        for entry in entries:
            self.batches.add(entry)
        await settled()
        return entries

    async def end(self, *names: str) -> None:
        self.sent.append([])
        self.journal.close(names)
        self.batches.look()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def engine() -> Engine:
    return Engine()


async def test_what_comes_to_an_idle_engine_is_sent_at_once(engine: Engine) -> None:
    await engine.ask("a")
    await engine.ask("b", "c")
    assert engine.sent == [["a"], ["b", "c"]] and AT_ONCE == 2


async def test_what_comes_to_a_busy_one_goes_with_the_next_batch(engine: Engine) -> None:
    await engine.ask("a")
    await engine.ask("b", "c")
    await engine.ask("d")
    await engine.ask("e", "f")
    await engine.end("b")  # of that batch one is left
    assert engine.sent[2:] == [[], [], []]
    await engine.end("c")
    assert engine.sent[-1] == ["d", "e", "f"]


async def test_one_that_has_ended_meanwhile_is_not_sent(engine: Engine) -> None:
    for name in ("a", "b", "c", "d"):
        await engine.ask(name)
    await engine.end("c")
    await engine.end("a", "b")
    assert engine.sent[-1] == ["d"]


async def test_a_lost_engine_leaves_no_batch_behind(engine: Engine) -> None:
    for name in ("a", "b", "c"):
        await engine.ask(name)
    engine.there = False
    engine.journal.lost()
    await engine.ask("d")
    assert engine.sent[-1] == []
    engine.there = True
    for entry in engine.journal:  # as when the next engine is there
        entry.sent()
    await engine.end("a", "b", "c", "d")
    await engine.ask("e")
    await engine.ask("f")
    assert engine.sent[-2:] == [["e"], ["f"]]
