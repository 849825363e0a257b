"""When the watch over an engine ends, and how; the engine here is a fake one, and so is the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine import watch as watch_module
from xinf_vllm_backend.engine.death import Ending
from xinf_vllm_backend.engine.journal import Journal
from xinf_vllm_backend.engine.seams import core_client
from xinf_vllm_backend.engine.watch import Watch
from xinf_vllm_backend.process.tree import Look
from xinf_vllm_backend.settings import Settings

TIMEOUT = 30.0  # seconds; only a hang reaches it
IDLE, STOPPED = Look(False, {2: 1.0}, {1: 1.0}), Look(True, {2: 1.0}, {1: 1.0})


class Engine:
    """Processes and client of one engine."""

    def __init__(self) -> None:
        self.dead = False
        self.is_lost = False
        self.calls = 0
        self.answers = True
        self.has_heartbeat = True
        self.looks = 0
        self.seen: Callable[[], Look] = lambda: IDLE
        self.client = self
        self.journal = Journal()

    def is_dead(self) -> bool:
        return self.dead

    def look(self) -> Look:
        self.looks += 1
        return self.seen()

    async def heartbeat(self) -> None:
        if not self.answers:
            await asyncio.get_running_loop().create_future()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    async def ask(client: Any) -> None:
        await client.heartbeat()

    monkeypatch.setattr(core_client, "ask_sign_of_life", ask)
    monkeypatch.setattr(core_client, "has_heartbeat", lambda client: client.has_heartbeat)
    monkeypatch.setattr(watch_module.platform, "is_cpu_build", lambda: True)
    return Engine()


def watch(engine: Engine, on_look: Callable[[], bool] = lambda: True, **options: Any) -> Watch:
    settings = Settings(**{"health_interval": 0.01, "hang_timeout": 0.1, **options})
    return Watch(engine, engine, settings, on_look)  # type: ignore[arg-type]


async def ends(watched: Watch) -> Ending:
    return await asyncio.wait_for(watched.until_end(), TIMEOUT)


async def test_an_engine_whose_process_ended_is_dead_at_once(engine: Engine) -> None:
    watched = watch(engine, health_interval=TIMEOUT)
    ending = asyncio.ensure_future(ends(watched))
    await asyncio.sleep(0)
    engine.dead = True
    watched.notice()
    assert await ending is Ending.DIED


async def test_an_engine_that_answers_no_heartbeat_and_does_no_work_hangs(engine: Engine) -> None:
    engine.answers = False
    watched = watch(engine)
    assert await ends(watched) is Ending.HUNG
    assert watched.limit == 0.1


async def test_an_engine_without_a_heartbeat_hangs_only_while_it_has_something_to_do(engine: Engine) -> None:
    engine.answers = engine.has_heartbeat = False
    assert await ends(watch(engine, on_look=lambda: engine.looks < 50)) is Ending.DIED  # because on_look said so
    engine.journal.open("a-1", "a", SimpleNamespace())
    assert await ends(watch(engine)) is Ending.HUNG


async def test_a_paused_engine_without_a_heartbeat_does_not_hang(engine: Engine) -> None:
    engine.answers = engine.has_heartbeat = False
    engine.journal.open("a-1", "a", SimpleNamespace())
    engine.journal.aborts_wanted = True
    assert await ends(watch(engine, on_look=lambda: engine.looks < 50)) is Ending.DIED


async def test_an_idle_engine_that_answers_goes_on(engine: Engine) -> None:
    watched = watch(engine, on_look=lambda: engine.looks < 50)
    assert await ends(watched) is Ending.DIED  # because on_look said so, and not HUNG before
    assert engine.looks == 50


async def test_an_engine_with_a_stopped_process_hangs_though_another_answers(engine: Engine) -> None:
    engine.seen = lambda: STOPPED
    assert await ends(watch(engine)) is Ending.HUNG


async def test_an_engine_whose_outputs_flow_is_not_asked(engine: Engine) -> None:
    engine.answers = False
    looks = 0

    def on_look() -> bool:
        nonlocal looks
        looks += 1
        engine.journal.outputs += 1
        return looks < 50

    assert await ends(watch(engine, on_look)) is Ending.DIED
    assert engine.looks == 0


async def test_an_engine_that_carries_out_a_call_is_given_more_time(engine: Engine) -> None:
    engine.answers, engine.calls = False, 1
    watched = watch(engine, call_timeout=0.4)
    assert await ends(watched) is Ending.HUNG
    assert watched.limit == 0.4


async def test_work_alone_counts_for_busy_factor_times_the_time_out(engine: Engine) -> None:
    engine.answers = False
    used = iter(range(1 << 30))
    engine.seen = lambda: Look(False, {}, {1: float(next(used))})
    watched = watch(engine, busy_factor=5.0)
    assert await ends(watched) is Ending.HUNG
    assert watched._hang.unanswered >= 0.5
