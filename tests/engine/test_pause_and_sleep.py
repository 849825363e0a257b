"""A real engine that is paused, sleeps and is woken, with requests in flight, and dies at it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from streams import (
    BOUND,
    ENGINE_CORE,
    TOKENS,
    WORKER,
    Gate,
    HeldRestart,
    MakeWatched,
    Stream,
    refusal,
    state,
    until,
    victim,
)

from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.pause import Order
from xinf_vllm_backend.engine.rest import Rest
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import ControlError, EnginePausedError

pytestmark = pytest.mark.engine


async def order(supervisor: EngineSupervisor, **given: Any) -> None:
    """Pause or put to sleep."""
    control = supervisor.control
    epoch = control.epoch + 1
    await control.prepare(Order.parse({"epoch": epoch, "timeout": BOUND, **given}))
    await control.commit(epoch)
    await control.confirm(epoch)


async def undisturbed(supervisor: EngineSupervisor) -> Any:
    stream = Stream(supervisor)
    await stream.end()
    return stream.told[0]


async def is_frozen(stream: Stream, given: int) -> None:
    """It gets what was under way, and then nothing: the engine answers, and does not step."""
    for _ in range(3):
        await stream._supervisor.is_paused()
    assert not stream.task.done() and stream.tokens - given <= 20


async def test_a_pause_that_keeps_requests_freezes_them_and_holds_others(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    expected = await undisturbed(supervisor)
    stream = Stream(supervisor)
    await stream.given(20)
    await order(supervisor, mode="keep")
    given = stream.tokens
    held, leaves = Stream(supervisor), Stream(supervisor)
    await until(lambda: supervisor.control.status()["waiting"] == 2)
    leaves.task.cancel()
    await asyncio.wait([leaves.task])
    assert supervisor.control.status()["waiting"] == 1
    await is_frozen(stream, given)
    await supervisor.control.resume()
    await asyncio.gather(stream.end(), held.end())
    assert stream.told[0] == held.told[0] == expected
    assert supervisor.requests() == 0 and supervisor.restarts == 0


async def test_a_pause_that_aborts_ends_requests_with_what_they_have(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    stream = Stream(supervisor)
    await stream.given(20)
    await order(supervisor, mode="abort")
    await stream.end()
    assert stream.told[0]["reason"] == "abort" and 20 <= stream.tokens < TOKENS
    await supervisor.control.resume()
    assert await Stream(supervisor).end() == TOKENS


async def test_a_pause_that_waits_lets_requests_end(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    stream = Stream(supervisor)
    await stream.given(5)
    await order(supervisor, mode="wait")
    assert stream.task.done() and stream.tokens == TOKENS
    await supervisor.control.resume()
    assert await Stream(supervisor).end() == TOKENS


async def test_a_request_waits_as_long_as_the_pause_lets_it(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    await order(supervisor, hold=0)
    with pytest.raises(EnginePausedError, match="send the request again later"):
        await Stream(supervisor).end()
    await supervisor.control.resume()
    await order(supervisor, hold=0.5)
    refused = await refusal(Stream(supervisor))
    assert isinstance(refused, EnginePausedError) and "waited for 0.5 s" in str(refused)
    await supervisor.control.resume()
    assert await Stream(supervisor).end() == TOKENS


async def test_a_pause_outlives_the_engine(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    expected = await undisturbed(supervisor)
    stream = Stream(supervisor)
    await stream.given(20)
    await order(supervisor, mode="keep")
    held = Stream(supervisor)
    os.kill(victim(supervisor, WORKER), signal.SIGKILL)
    await until(lambda: supervisor.restarts == 1 and state(supervisor) is State.READY)
    given = stream.tokens
    await supervisor.get_supported_tasks()  # the next engine answers
    assert stream.tokens == given and held.tokens == 0
    await supervisor.control.resume()
    await asyncio.gather(stream.end(), held.end())
    assert stream.told[0] == held.told[0] == expected


async def test_an_engine_killed_between_the_phases_is_paused_when_it_is_back(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = await make_watched()
    expected = await undisturbed(supervisor)
    stream, restart = Stream(supervisor), HeldRestart(monkeypatch)
    await stream.given(20)
    control = supervisor.control
    await control.prepare(Order(epoch=1, mode="keep", timeout=BOUND))
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    await restart.begun()
    committing = asyncio.ensure_future(control.commit(1))
    restart.let_go()
    await committing
    await control.confirm(1)
    await control.resume()
    await stream.end()
    assert stream.told[0] == expected and supervisor.restarts == 1


async def test_an_engine_that_is_stopped_between_the_phases_serves_afterwards(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xinf_vllm_backend.engine.pause.UNDO_TIMEOUT", 1.0)
    supervisor = await make_watched()
    expected = await undisturbed(supervisor)
    stream, control = Stream(supervisor), supervisor.control
    await stream.given(20)
    await control.prepare(Order(epoch=1, mode="keep", timeout=1.0))
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGSTOP)
    with pytest.raises(ControlError, match="tiny is serving"):
        await control.commit(1)
    await stream.end()
    assert stream.told[0] == expected
    assert supervisor.restarts == 1 and supervisor.control.status()["control"] == "serving"


async def test_asleep_it_has_no_processes_and_keeps_its_requests(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    expected = await undisturbed(supervisor)
    stream = Stream(supervisor)
    await stream.given(20)
    processes = [psutil.Process(each["pid"]) for each in supervisor.processes()]
    await order(supervisor, action="sleep", mode="keep")
    assert state(supervisor) is State.ASLEEP and not supervisor.is_dead()
    assert not any(process.is_running() for process in processes) and supervisor.processes() == []
    held = Stream(supervisor)
    await until(lambda: supervisor.requests() == 2)
    assert state(supervisor) is State.ASLEEP  # a request does not wake what was ordered to sleep
    await supervisor.control.resume()
    await asyncio.gather(stream.end(), held.end())
    assert stream.told[0] == held.told[0] == expected
    assert supervisor.restarts == 0 and state(supervisor) is State.READY


def wakings(supervisor: EngineSupervisor) -> int:
    return sum(move.state is State.WAKING for move in supervisor.lifecycle.history)


async def test_an_idle_engine_sleeps_and_requests_wake_it_once(make_watched: MakeWatched) -> None:
    supervisor = await make_watched(idle_sleep_after=0.2, health_interval=0.05)
    await until(lambda: state(supervisor) is State.ASLEEP)
    before = wakings(supervisor)
    streams = [Stream(supervisor) for _ in range(10)]
    await asyncio.gather(*(stream.end() for stream in streams))
    assert {stream.tokens for stream in streams} == {TOKENS}
    assert wakings(supervisor) == before + 1 and supervisor.restarts == 0
    await until(lambda: state(supervisor) is State.ASLEEP)
    assert await supervisor.get_supported_tasks() and supervisor.requests() == 0


async def test_an_idle_engine_that_is_ordered_to_sleep_is_not_woken_by_requests(make_watched: MakeWatched) -> None:
    supervisor = await make_watched(idle_sleep_after=0.2, health_interval=0.05)
    await until(lambda: state(supervisor) is State.ASLEEP)
    await order(supervisor, action="sleep", hold=0)
    with pytest.raises(EnginePausedError):
        await Stream(supervisor).end()
    assert state(supervisor) is State.ASLEEP
    await supervisor.control.resume()
    assert await Stream(supervisor).end() == TOKENS


async def test_an_engine_that_cannot_be_woken_is_tried_again(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    supervisor = await make_watched(idle_sleep_after=0.2, health_interval=0.05)
    await until(lambda: state(supervisor) is State.ASLEEP)
    config = tiny_model / "config.json"
    text = config.read_text()
    config.write_text("{")
    try:
        stream = Stream(supervisor)
        await until(lambda: state(supervisor) is State.RESTARTING)
    finally:
        config.write_text(text)
    assert await stream.end() == TOKENS


async def test_stopped_while_it_sleeps_it_ends(make_watched: MakeWatched) -> None:
    supervisor = await make_watched(idle_sleep_after=0.2, health_interval=0.05)
    await until(lambda: state(supervisor) is State.ASLEEP)
    await asyncio.to_thread(supervisor.stop, 5)
    assert state(supervisor) is State.STOPPED


async def test_by_the_sleep_of_vllm_its_processes_live_on(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs that sleep does nothing, but all calls are made."""
    monkeypatch.setattr(Rest, "_has_sleep_mode", lambda self: True)
    supervisor = await make_watched(idle_sleep_after=0.2, health_interval=0.05)
    await until(lambda: state(supervisor) is State.ASLEEP)
    core = victim(supervisor, ENGINE_CORE)
    assert await Stream(supervisor).end() == TOKENS
    assert victim(supervisor, ENGINE_CORE) == core
    await until(lambda: state(supervisor) is State.ASLEEP)
    os.kill(core, signal.SIGKILL)
    await until(lambda: supervisor.processes() == [])
    assert state(supervisor) is State.ASLEEP and supervisor.restarts == 0
    assert await Stream(supervisor).end() == TOKENS


async def test_a_gate_that_is_closed_while_the_engine_is_held_up(make_watched: MakeWatched, tmp_path: Path) -> None:
    """A step that lasts does not keep the pause from being undone in time."""
    supervisor = await make_watched()
    gate = Gate(tmp_path / "gate")
    stream = Stream(supervisor, **gate.params)
    await gate.reached(stream)
    control = supervisor.control
    await control.prepare(Order(epoch=1, mode="wait", timeout=1.0))
    with pytest.raises(ControlError, match="1 requests had not ended"):
        await control.commit(1)
    gate.open()
    assert await stream.end() == TOKENS
