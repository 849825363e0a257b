"""The deadlocks of vLLM's PR 39366 and after, on real ranks that take each step together.

Each order ends within its deadline, in a stage that is said, and the engine serves afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
import pytest_asyncio
from fault_names import FAULTS
from streams import BOUND, ENGINE_CORE, EXPERTS, TOKENS, TWO_RANKS, Stream, until, victim

from xinf_vllm_backend.demo.tiny_model import make_tiny_model
from xinf_vllm_backend.engine import pause
from xinf_vllm_backend.engine.pause import Order, Stage
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import ControlError, EngineDiedError
from xinf_vllm_backend.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

T = TypeVar("T")

HANG_TIMEOUT = 2.0  # seconds
SHORT = 1.0  # seconds: a deadline that is to be reached
LONG, ENDLESS = 200, 1900  # tokens of requests that are under way, and still are after SHORT
BEGUN = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_model: Path) -> AsyncIterator[EngineSupervisor]:
    """One for all tests of this module."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = AsyncEngineArgs(
        model=str(tiny_model), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        logits_processors=[FAULTS], data_parallel_size=2, **EXPERTS,
    )  # fmt: skip
    settings = Settings(engine_start_method="zygote", hang_timeout=HANG_TIMEOUT, max_restarts=50, restart_refill=0.001)
    supervisor = EngineSupervisor(EngineSpec("tiny", arguments, settings, TWO_RANKS))
    await asyncio.to_thread(supervisor.start)
    watching = asyncio.ensure_future(supervisor.watch())
    yield supervisor
    watching.cancel()
    await asyncio.wait([watching])
    left = [psutil.Process(process["pid"]) for process in supervisor.processes()]
    await asyncio.to_thread(supervisor.stop, 0)
    await asyncio.sleep(0)  # vLLM closes its sockets on the loop that it served from
    assert not [process for process in left if process.is_running()]


def on_both(engine: EngineSupervisor, tokens: int) -> list[Stream]:
    return [Stream(engine, rank=rank, max_tokens=tokens) for rank in (0, 1)]


async def texts(streams: list[Stream]) -> list[str]:
    for stream in streams:
        await stream.end()
    return [stream.told[0]["text"] for stream in streams]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: EngineSupervisor) -> list[str]:
    """What requests on both ranks are told that nothing happens to."""
    return await texts(on_both(engine, LONG))


@pytest_asyncio.fixture(loop_scope="module")
async def begun(engine: EngineSupervisor, undisturbed: list[str]) -> AsyncIterator[list[Stream]]:
    """Requests that are under way, one on each rank, and have to end as if nothing had happened."""
    streams = on_both(engine, LONG)
    await asyncio.gather(*(stream.given(BEGUN) for stream in streams))
    yield streams
    assert stage(engine) is Stage.SERVING
    assert await texts(streams) == undisturbed
    await serves(engine)


async def serves(engine: EngineSupervisor) -> None:
    assert [await stream.end() for stream in on_both(engine, TOKENS)] == [TOKENS, TOKENS]
    assert engine.requests() == 0


def stage(engine: EngineSupervisor) -> Stage:
    return engine.control.stage


def identity(rank: int) -> bytes:
    return rank.to_bytes(2, "little")


def core_of(engine: EngineSupervisor) -> Any:
    """vLLM's own client of the ranks."""
    assert engine._processes is not None
    return engine._processes.client


async def call(engine: EngineSupervisor, method: str, rank: int) -> Any:
    return await bounded(core_of(engine)._call_utility_async(method, engine=identity(rank)))


async def bounded(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, BOUND)


class Held:
    """A call to one rank that is sent when it is let go; all such calls to any rank are counted."""

    def __init__(self, engine: EngineSupervisor, method: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.calls = 0
        core = core_of(engine)
        original = core._call_utility_async

        async def held(name: str, *args: Any, engine: bytes) -> Any:
            if name == method:
                self.calls += 1
                if engine == identity(rank):
                    self.begun.set()
                    await self.let_go.wait()
            return await original(name, *args, engine=engine)

        monkeypatch.setattr(core, "_call_utility_async", held)


def next_order(engine: EngineSupervisor, **options: Any) -> Order:
    return Order(epoch=engine.control.epoch + 1, **options)


async def carry_out(engine: EngineSupervisor, **options: Any) -> None:
    order = next_order(engine, **options)
    await engine.control.prepare(order)
    await bounded(engine.control.commit(order.epoch))
    await engine.control.confirm(order.epoch)


async def test_a_collective_that_reaches_one_rank_after_the_other_meets_both_though_a_request_comes_between(
    engine: EngineSupervisor, begun: list[Stream]
) -> None:
    """In the form of vLLM's test_dp_pause_barrier_request_deadlock."""
    await carry_out(engine, mode="keep")
    first = asyncio.ensure_future(call(engine, "barrier", 0))
    held = Stream(engine, rank=1)
    await until(lambda: engine.requests() == 3)
    assert await call(engine, "is_scheduler_paused", 1) is True  # it has taken what came before this
    assert not first.done()
    await bounded(asyncio.gather(first, call(engine, "barrier", 1)))
    assert held.tokens == 0 and stage(engine) is Stage.PAUSED
    await bounded(engine.control.resume())
    assert await held.end() == TOKENS


async def test_a_stale_wave_start_wakes_no_paused_rank(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    await carry_out(engine, mode="keep")
    started = asyncio.Event()
    decode = msgspec.msgpack.decode

    def decoded(*args: Any, **kwargs: Any) -> Any:
        found = decode(*args, **kwargs)
        if isinstance(found, list) and len(found) == 3 and found[2] is True:
            started.set()  # the coordinator has told the ranks before it told us
        return found

    monkeypatch.setattr(msgspec.msgpack, "decode", decoded)
    await until(lambda: not core_of(engine).engines_running)  # as the coordinator says
    await core_of(engine).first_req_send_socket.send(msgspec.msgpack.encode(("FIRST_REQ", 0)))
    with contextlib.suppress(asyncio.TimeoutError):  # of a wave that paused ranks drop, vLLM 0.32 tells us nothing
        await asyncio.wait_for(started.wait(), SHORT)
    first = asyncio.ensure_future(call(engine, "barrier", 1))
    assert await call(engine, "is_scheduler_paused", 0) is True
    await bounded(asyncio.gather(first, call(engine, "barrier", 0)))
    await bounded(engine.control.resume())


async def test_a_pause_that_reaches_a_rank_late_meets_the_other_as_it_steps(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Held(engine, "pause_scheduler", 1, monkeypatch)
    pausing = asyncio.ensure_future(carry_out(engine, mode="keep"))
    await bounded(late.begun.wait())
    assert await call(engine, "is_scheduler_paused", 0) is True
    not_paused = begun[1]
    await not_paused.given(not_paused.tokens + 50)  # they take these steps together
    assert not pausing.done()
    late.let_go.set()
    await bounded(pausing)
    assert stage(engine) is Stage.PAUSED
    await bounded(engine.control.resume())


async def test_a_pause_that_only_one_rank_has_got_is_rolled_back_on_all(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that waits for the others to pause does not resume, so it is rolled back by pausing all."""
    before = engine.restarts
    late = Held(engine, "pause_scheduler", 1, monkeypatch)
    order = next_order(engine, mode="keep")
    await engine.control.prepare(order)
    committing = asyncio.ensure_future(engine.control.commit(order.epoch))
    await bounded(late.begun.wait())
    assert await call(engine, "is_scheduler_paused", 0) is True
    back = asyncio.ensure_future(engine.control.roll_back(order.epoch, "another replica did not answer"))
    await until(lambda: stage(engine) is Stage.RESUMING)
    late.let_go.set()
    with pytest.raises(ControlError, match="another replica did not answer"):
        await bounded(committing)
    await bounded(back)
    assert stage(engine) is Stage.SERVING and engine.restarts == before


async def test_an_engine_of_which_a_rank_never_gets_its_pause_is_restarted(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "UNDO_TIMEOUT", SHORT)
    before = engine.restarts
    Held(engine, "pause_scheduler", 1, monkeypatch)
    with pytest.raises(ControlError):
        await bounded(carry_out(engine, mode="keep", timeout=SHORT))
    await until(lambda: stage(engine) is Stage.SERVING and engine.restarts == before + 1)


async def test_two_resumes_at_once_are_one(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    await carry_out(engine, mode="keep")
    resume = Held(engine, "resume_scheduler", 1, monkeypatch)
    both = [asyncio.ensure_future(engine.control.resume()) for _ in range(2)]
    await bounded(resume.begun.wait())
    third = asyncio.ensure_future(engine.control.resume())  # while rank 0 waits for rank 1 to resume
    resume.let_go.set()
    await bounded(asyncio.gather(*both, third))
    assert resume.calls == 2  # one for each rank
    await bounded(engine.control.resume())
    assert resume.calls == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_rank_that_dies_or_stops_between_prepare_and_commit_leaves_a_paused_engine(
    engine: EngineSupervisor, begun: list[Stream], how: signal.Signals
) -> None:
    before = engine.restarts
    order = next_order(engine, mode="keep")
    await engine.control.prepare(order)
    os.kill(victim(engine, ENGINE_CORE, 1), how)
    await bounded(engine.control.commit(order.epoch))
    await engine.control.confirm(order.epoch)
    assert stage(engine) is Stage.PAUSED and engine.restarts == before + 1
    assert [await call(engine, "is_scheduler_paused", rank) for rank in (0, 1)] == [True, True]
    await bounded(engine.control.resume())


async def test_a_rank_that_stops_and_is_not_replaced_by_the_deadline_leaves_a_serving_engine(
    engine: EngineSupervisor, begun: list[Stream]
) -> None:
    order = next_order(engine, mode="keep", timeout=SHORT)
    await engine.control.prepare(order)
    os.kill(victim(engine, ENGINE_CORE, 1), signal.SIGSTOP)
    with pytest.raises(ControlError):
        await bounded(engine.control.commit(order.epoch))
    await until(lambda: stage(engine) is Stage.SERVING)


async def test_waiting_for_an_endless_request_ends_by_aborting_it_or_by_rolling_back(engine: EngineSupervisor) -> None:
    endless = on_both(engine, ENDLESS)
    await asyncio.gather(*(stream.given(BEGUN) for stream in endless))
    with pytest.raises(ControlError, match="had not ended"):
        await carry_out(engine, mode="wait", timeout=SHORT, on_timeout="roll_back")
    assert stage(engine) is Stage.SERVING and not any(stream.task.done() for stream in endless)
    await carry_out(engine, mode="wait", timeout=SHORT, on_timeout="abort")
    assert stage(engine) is Stage.PAUSED
    for stream in endless:
        await stream.end()
        assert stream.told[0]["reason"] == "abort"
    await bounded(engine.control.resume())
    await serves(engine)


async def test_a_sleep_that_is_asked_for_while_the_engine_pauses_is_refused_and_comes_after_it(
    engine: EngineSupervisor, begun: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Held(engine, "pause_scheduler", 0, monkeypatch)
    pausing = asyncio.ensure_future(carry_out(engine, mode="keep"))
    await bounded(late.begun.wait())
    with pytest.raises(ControlError, match="committing"):
        await engine.control.prepare(next_order(engine, action="sleep", mode="keep"))
    late.let_go.set()
    await bounded(pausing)
    await carry_out(engine, action="sleep", mode="keep")
    assert stage(engine) is Stage.ASLEEP
    await bounded(engine.control.resume())


async def test_weights_that_are_given_to_a_paused_engine_reach_all_ranks_or_none(
    engine: EngineSupervisor,
    undisturbed: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {"kwargs": {"weights_path": str(make_tiny_model(tmp_path / "other", seed=1))}}
    await carry_out(engine, mode="keep")
    half = Held(engine, "collective_rpc", 1, monkeypatch)
    giving = asyncio.ensure_future(engine.collective_rpc("reload_weights", **other))
    await bounded(half.begun.wait())
    await call(engine, "is_scheduler_paused", 0)  # this rank has them
    os.kill(victim(engine, ENGINE_CORE, 1), signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="may be half done"):
        await bounded(giving)
    await bounded(engine.control.resume())
    assert await texts(on_both(engine, LONG)) == undisturbed

    await carry_out(engine, mode="keep")
    await bounded(engine.collective_rpc("reload_weights", **other))
    await bounded(engine.control.resume())
    changed = await texts(on_both(engine, LONG))
    assert changed[0] == changed[1] != undisturbed[0]
    await carry_out(engine, mode="keep")
    await bounded(engine.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)}))
    await bounded(engine.control.resume())
    assert await texts(on_both(engine, LONG)) == undisturbed
