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
CORE, WORKER, OTHER_CORE, OTHER_WORKER, COORDINATOR = range(1, 6)  # pids; the others are of the second rank


def seen(*halted: int, core: float = 1.0, worker: float = 1.0) -> Look:
    """A look at idle processes, of which some are stopped; those of the first rank may have used more CPU."""
    workers, others = {WORKER: worker, OTHER_WORKER: 1.0}, {CORE: core, OTHER_CORE: 1.0, COORDINATOR: 1.0}
    return Look(frozenset(halted), workers, others)


class Engine:
    """Processes and client of one engine.

    Attributes:
        dumb: ranks that answer nothing; None is an engine that is one rank.
        of_ranks: the rank of each process that has one.
    """

    def __init__(self) -> None:
        self.dead = False
        self.is_lost = False
        self.calls = 0
        self.dumb: set[int | None] = set()
        self.has_heartbeat = True
        self.looks = 0
        self.seen: Callable[[], Look] = seen
        self.of_ranks: dict[int, int] = {}
        self.client = self
        self.journal = Journal()

    def is_dead(self) -> bool:
        return self.dead

    def look(self) -> Look:
        self.looks += 1
        return self.seen()

    def ranks(self) -> dict[int, int]:
        return self.of_ranks

    async def heartbeat(self, rank: int | None) -> None:
        if rank in self.dumb:
            await asyncio.get_running_loop().create_future()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    async def ask(client: Any, rank: int | None) -> None:
        await client.heartbeat(rank)

    monkeypatch.setattr(core_client, "ask_sign_of_life", ask)
    monkeypatch.setattr(core_client, "ranks", lambda client: tuple(sorted(set(client.of_ranks.values()))))
    monkeypatch.setattr(core_client, "has_heartbeat", lambda client: client.has_heartbeat)
    monkeypatch.setattr(watch_module.platform, "is_cpu_build", lambda: True)
    return Engine()


@pytest.fixture
def ranks(engine: Engine) -> Engine:
    """An engine of two ranks and a coordinator."""
    engine.of_ranks = {CORE: 0, WORKER: 0, OTHER_CORE: 1, OTHER_WORKER: 1}
    return engine


def looks(engine: Engine, count: int, outputs_of: int | None = None) -> Callable[[], bool]:
    """What is done at each look: after ``count`` of them the watch ends; one rank may give outputs meanwhile."""
    left = iter(range(count))

    def on_look() -> bool:
        if outputs_of is not None:
            engine.journal.outputs[outputs_of] += 1
        return next(left, None) is not None

    return on_look


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
    engine.dumb = {None}
    watched = watch(engine)
    assert await ends(watched) is Ending.HUNG
    assert watched.limit == 0.1


async def test_an_engine_without_a_heartbeat_hangs_only_while_it_has_something_to_do(engine: Engine) -> None:
    engine.dumb, engine.has_heartbeat = {None}, False
    assert await ends(watch(engine, on_look=lambda: engine.looks < 50)) is Ending.DIED  # because on_look said so
    engine.journal.open("a-1", "a", SimpleNamespace())
    assert await ends(watch(engine)) is Ending.HUNG


async def test_a_paused_engine_without_a_heartbeat_does_not_hang(engine: Engine) -> None:
    engine.dumb, engine.has_heartbeat = {None}, False
    engine.journal.open("a-1", "a", SimpleNamespace())
    engine.journal.aborts_wanted = True
    assert await ends(watch(engine, on_look=lambda: engine.looks < 50)) is Ending.DIED


async def test_an_idle_engine_that_answers_goes_on(engine: Engine) -> None:
    watched = watch(engine, on_look=lambda: engine.looks < 50)
    assert await ends(watched) is Ending.DIED  # because on_look said so, and not HUNG before
    assert engine.looks == 50


async def test_an_engine_with_a_stopped_process_hangs_though_another_answers(engine: Engine) -> None:
    engine.seen = lambda: seen(WORKER)
    assert await ends(watch(engine)) is Ending.HUNG


async def test_an_engine_whose_outputs_flow_is_not_asked(engine: Engine) -> None:
    engine.dumb = {None}
    assert await ends(watch(engine, looks(engine, 50, outputs_of=0))) is Ending.DIED
    assert engine.looks == 0


async def test_an_engine_that_carries_out_a_call_is_given_more_time(engine: Engine) -> None:
    engine.dumb, engine.calls = {None}, 1
    watched = watch(engine, call_timeout=0.4)
    assert await ends(watched) is Ending.HUNG
    assert watched.limit == 0.4


async def test_work_alone_counts_for_busy_factor_times_the_time_out(engine: Engine) -> None:
    engine.dumb = {None}
    used = iter(range(1 << 30))
    engine.seen = lambda: seen(core=float(next(used)))
    watched = watch(engine, busy_factor=5.0)
    assert await ends(watched) is Ending.HUNG
    assert watched._ranks[0].clock.unanswered >= 0.5


class TestRanks:
    async def test_ranks_that_are_idle_and_answer_are_no_hang(self, ranks: Engine) -> None:
        assert await ends(watch(ranks, looks(ranks, 50))) is Ending.DIED

    async def test_a_rank_whose_silence_the_outputs_of_another_hide_is_found(self, ranks: Engine) -> None:
        ranks.dumb = {1}
        watched = watch(ranks, looks(ranks, 1000, outputs_of=0))
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ("rank 1",)

    async def test_a_rank_that_is_idle_and_answers_while_another_gives_outputs_is_no_hang(self, ranks: Engine) -> None:
        assert await ends(watch(ranks, looks(ranks, 50, outputs_of=1))) is Ending.DIED

    async def test_a_stopped_process_makes_its_rank_hang_and_no_other(self, ranks: Engine) -> None:
        ranks.seen = lambda: seen(OTHER_WORKER)
        watched = watch(ranks, looks(ranks, 1000, outputs_of=0))
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ("rank 1",)

    async def test_a_stopped_coordinator_is_found(self, ranks: Engine) -> None:
        ranks.seen = lambda: seen(COORDINATOR)
        watched = watch(ranks, looks(ranks, 1000, outputs_of=0))
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ("coordinator",)

    async def test_ranks_that_hang_all_are_the_engine(self, ranks: Engine) -> None:
        ranks.dumb = {0, 1}
        watched = watch(ranks)
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ()

    async def test_a_rank_that_waits_for_one_that_computes_does_not_hang_before_that(self, ranks: Engine) -> None:
        ranks.dumb = {0, 1}
        used = iter(range(1 << 30))
        ranks.seen = lambda: seen(core=float(next(used)))
        watched = watch(ranks, busy_factor=5.0)
        assert await ends(watched) is Ending.HUNG
        assert all(rank.clock.unanswered >= 0.5 for rank in watched._ranks)

    async def test_a_stopped_rank_hangs_though_another_computes(self, ranks: Engine) -> None:
        ranks.dumb = {0, 1}
        used = iter(range(1 << 30))
        ranks.seen = lambda: seen(OTHER_CORE, core=float(next(used)))
        watched = watch(ranks, busy_factor=1000.0)
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ("rank 1",)

    async def test_on_gpus_a_rank_that_waits_spins_and_an_idle_one_hangs(
        self, ranks: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch_module.platform, "is_cpu_build", lambda: False)
        ranks.dumb = {0, 1}
        used = iter(range(1 << 30))
        ranks.seen = lambda: seen(worker=float(next(used)))
        watched = watch(ranks, busy_factor=1000.0)
        assert await ends(watched) is Ending.HUNG
        assert watched.silent == ("rank 1",)

    async def test_ranks_of_processes_that_are_not_known_are_judged_by_all_of_them(self, ranks: Engine) -> None:
        watched = watch(ranks, looks(ranks, 1000, outputs_of=0))
        ranks.of_ranks = {}
        ranks.seen = lambda: seen(OTHER_WORKER)
        assert await ends(watched) is Ending.HUNG
