"""What may happen while a real engine is restarted in place."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from streams import ENGINE_CORE, TOKENS, Gate, HeldRestart, MakeWatched, Stream, refusal, state, until, victim

from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.processes import EngineProcesses
from xinf_vllm_backend.engine.seams.exceptions import engine_dead_errors
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import EngineRestartingError, EngineStaleError
from xinf_vllm_backend.process.tree import ProcessTree

pytestmark = pytest.mark.engine


async def cut_amid(supervisor: EngineSupervisor, tmp_path: Path) -> Stream:
    """A stream whose EngineCore is killed in its midst."""
    gate = Gate(tmp_path / "gate")
    stream = Stream(supervisor, **gate.params)
    await gate.reached(stream)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    return stream


async def test_a_client_that_leaves_frees_its_entry_also_while_the_engine_restarts(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    restart, gate = HeldRestart(monkeypatch), Gate(tmp_path / "gate")
    stays, leaves, leaves_later = (Stream(supervisor, **gate.params) for _ in range(3))
    await asyncio.gather(*map(gate.reached, (stays, leaves, leaves_later)))
    leaves.task.cancel()
    await asyncio.wait([leaves.task])
    assert supervisor.requests() == 2
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    await restart.begun()
    comes = Stream(supervisor)
    await until(lambda: supervisor.requests() == 3)
    leaves_later.task.cancel()
    await asyncio.wait([leaves_later.task])
    assert supervisor.requests() == 2
    restart.let_go()
    assert await stays.end() == await comes.end() == TOKENS
    assert supervisor.restarts == 1 and supervisor.requests() == 0


async def test_an_engine_that_does_not_come_back_fails_with_the_first_cause_and_the_last(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    supervisor = await make_watched(model=str(copy), max_restarts=2, restart_refill=1000.0, recovery_timeout=0.3)
    restart, gate = HeldRestart(monkeypatch), Gate(tmp_path / "gate")
    begun, waits = Stream(supervisor, **gate.params), Stream(supervisor, **gate.params)
    await gate.reached(begun)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    for stream in (begun, waits):
        assert isinstance(await refusal(stream), EngineRestartingError)  # after 0.3 s
    restart.let_go()
    await until(lambda: state(supervisor) is State.FAILED)
    assert (
        "was killed by SIGKILL; it could not be restarted, in 2 attempts, the last time because" in supervisor.failure
    )
    assert "Safetensor" in supervisor.failure
    with pytest.raises(engine_dead_errors()):
        await Stream(supervisor).end()
    assert supervisor.processes() == []


async def test_no_engine_is_started_beside_one_that_cannot_be_killed(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    # Nothing here can be made to survive SIGKILL, as a process that waits for a device may.
    kill, start = ProcessTree.kill, EngineProcesses.start
    surviving = [psutil.Process()] * 4
    starts: list[int] = []

    def counted(*args: Any) -> Any:
        starts.append(len(surviving))
        return start(*args)

    monkeypatch.setattr(
        ProcessTree, "kill", lambda tree, timeout: [*kill(tree, timeout), *(surviving.pop() for _ in surviving[:1])]
    )
    monkeypatch.setattr(EngineProcesses, "start", counted)
    stream = await cut_amid(supervisor, tmp_path)
    assert await stream.end() == TOKENS
    assert starts == [0] and supervisor.restarts == 1
    assert f"Processes of the vLLM engine of {supervisor.name} could not be killed: pid {os.getpid()}" in caplog.text


async def test_weights_that_were_changed_make_a_restarted_engine_stale_until_they_come_again(
    make_watched: MakeWatched, tiny_model: Path, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    changed = {"kwargs": {"weights_path": str(tiny_model)}}
    await supervisor.collective_rpc("reload_weights", **changed)
    stream = await cut_amid(supervisor, tmp_path)
    error = await refusal(stream)
    assert isinstance(error, EngineStaleError) and "reload_weights()" in str(error)
    assert state(supervisor) is State.STALE
    assert isinstance(await refusal(Stream(supervisor)), EngineStaleError)
    await supervisor.collective_rpc("reload_weights", **changed)
    assert state(supervisor) is State.READY
    assert await Stream(supervisor).end() == TOKENS


async def test_weights_reloaded_as_they_were_launched_leave_a_restarted_engine_ready(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    """As after a sleep of level 2."""
    supervisor = await make_watched()
    await supervisor.collective_rpc("reload_weights")
    stream = await cut_amid(supervisor, tmp_path)
    assert await stream.end() == TOKENS
    assert state(supervisor) is State.READY


async def test_an_engine_whose_outputs_are_no_longer_read_is_given_up_at_once(make_watched: MakeWatched) -> None:
    """It lives and answers heartbeats, and no request would get anything."""
    supervisor = await make_watched()
    supervisor.output_handler.cancel()
    await until(lambda: state(supervisor) is State.FAILED)
    assert "The task that reads the outputs of the vLLM engine of tiny ended" in supervisor.failure


async def test_a_stop_while_the_engine_restarts_ends_its_requests_and_processes(
    make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    restart, gate = HeldRestart(monkeypatch), Gate(tmp_path / "gate")
    restart.let_go()  # it is to be on its way
    stream = Stream(supervisor, **gate.params)
    await gate.reached(stream)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    await restart.begun()
    await asyncio.to_thread(supervisor.stop, 5)
    assert "was stopped while the request ran" in str(await refusal(stream))
    assert state(supervisor) is State.STOPPED and supervisor.processes() == []
