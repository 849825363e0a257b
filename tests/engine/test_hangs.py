"""Real engines that hang, and those that only seem to."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from streams import ENGINE_CORE, TOKENS, WORKER, MakeWatched, Stream, deaths, until, victim, with_fault

pytestmark = pytest.mark.engine

HANG_TIMEOUT = 2.0  # seconds


@pytest.mark.parametrize("title", [ENGINE_CORE, WORKER])
async def test_a_stopped_process_of_an_idle_engine_is_found_and_replaced(make_watched: MakeWatched, title: str) -> None:
    supervisor = await make_watched(hang_timeout=HANG_TIMEOUT)
    os.kill(victim(supervisor, title), signal.SIGSTOP)
    await until(lambda: supervisor.restarts == 1)
    assert "hangs: for 2 s it has given no sign of life" in deaths(supervisor)[0]
    assert await Stream(supervisor).end() == TOKENS


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
