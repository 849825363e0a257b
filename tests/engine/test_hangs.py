"""Real engines that hang, and those that only seem to."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from streams import ENGINE_CORE, TOKENS, WORKER, Make, MakeWatched, Stream, deaths, until, victim, with_fault

from xinf_vllm_backend.errors import EngineStartTimeoutError

pytestmark = pytest.mark.engine

HANG_TIMEOUT = 2.0  # seconds
LOAD_TIMEOUT = 10.0  # seconds


@pytest.mark.parametrize("title", [ENGINE_CORE, WORKER])
async def test_a_stopped_process_of_an_idle_engine_is_found_and_replaced(make_watched: MakeWatched, title: str) -> None:
    supervisor = await make_watched(hang_timeout=HANG_TIMEOUT)
    pid = victim(supervisor, title)
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: supervisor.restarts == 1)
    (death,) = [move.death for move in supervisor.lifecycle.history if move.death is not None]
    assert [stack.text for stack in death.stacks if stack.pid == pid] == [
        "It is stopped, as by SIGSTOP, and cannot answer."
    ]
    assert "hangs: for 2 s it has given no sign of life" in deaths(supervisor)[0]
    assert await Stream(supervisor).end() == TOKENS


async def test_a_hang_is_explained_by_the_stacks_and_the_requests_of_its_engine(
    make_watched: MakeWatched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await make_watched(hang_timeout=HANG_TIMEOUT)
    stream = Stream(supervisor, **with_fault("waits", 10, tmp_path / "done"))
    assert await stream.end() == TOKENS
    (death,) = [move.death for move in supervisor.lifecycle.history if move.death is not None]
    core, worker = (next(each for each in death.stacks if each.title.startswith(name)) for name in ("Engine", "Vllm"))
    assert "engine_faults.py" in worker.text and " in waits" in worker.text
    assert " in collective_rpc" in core.text  # it waits for the Worker
    (request,) = death.requests
    assert request.id == stream.id and 0 < request.given_tokens < TOKENS
    assert " in waits" in caplog.text and stream.id in caplog.text


async def test_a_start_that_runs_into_load_timeout_is_explained_by_stacks(
    make_supervisor: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XINF_VLLM_TEST_STALLED", str(tmp_path / "stalled"))
    supervisor = make_supervisor(logits_processors=["engine_faults:StallsWhenMade"], load_timeout=LOAD_TIMEOUT)
    with pytest.raises(EngineStartTimeoutError):
        await asyncio.to_thread(supervisor.start)
    assert "at the end of load_timeout" in caplog.text
    if (tmp_path / "stalled").exists():  # else the machine was too slow for it to come so far
        assert "engine_faults.py" in caplog.text and " in waits" in caplog.text


async def test_an_engine_that_computes_for_longer_than_hang_timeout_does_not_hang(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched(hang_timeout=HANG_TIMEOUT)
    computing = Stream(supervisor, **with_fault("computes", 10, tmp_path / "done"))  # for 6 s, in one step
    assert await computing.end() == TOKENS and (tmp_path / "done").exists()
    assert deaths(supervisor) == []


async def test_an_engine_that_is_paused_for_longer_than_hang_timeout_does_not_hang(make_watched: MakeWatched) -> None:
    supervisor = await make_watched(hang_timeout=HANG_TIMEOUT)
    await supervisor.pause_generation(mode="keep")
    paused = Stream(supervisor)
    await asyncio.wait([paused.task], timeout=1.5 * HANG_TIMEOUT)
    assert paused.tokens == 0
    await supervisor.resume_generation()
    assert await paused.end() == TOKENS
    assert deaths(supervisor) == []
