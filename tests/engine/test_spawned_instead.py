"""An engine that fails when its processes are forked is spawned, within one start."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fault_names import FAILS_WHEN_FORKED, FAILURE
from streams import BOUND, ENGINE_CORE, TOKENS, WORKER, Make, MakeWatched, Stream, state, until, victim

from xinf_vllm_backend.engine import preload
from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import EngineStartError

pytestmark = pytest.mark.engine

SPAWNED = 3 * BOUND  # an engine whose processes import vLLM one after the other


@pytest.fixture
def own_zygote(make_watched: MakeWatched, tiny_model: Path) -> Iterator[int]:
    """A zygote that may be given up; the other tests have theirs again when this one ends, before its engines do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preload, "_zygote", None)
        patch.setattr(preload, "_given_up", False)
        preload.start_zygote("auto", str(tiny_model))
        pid = preload.zygote_pid()
        assert pid is not None
        yield pid
        preload.stop_zygote()


def is_spawned(supervisor: EngineSupervisor) -> bool:
    core = victim(supervisor, ENGINE_CORE)
    parents = [psutil.Process(pid).ppid() for pid in (core, victim(supervisor, WORKER))]
    return parents == [os.getpid(), core]


async def test_an_engine_that_crashes_when_forked_is_spawned_at_its_launch_and_at_each_restart(
    own_zygote: int, make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILURE, "segfaults")
    supervisor = await make_watched(method="auto", logits_processors=[FAILS_WHEN_FORKED], recovery_timeout=SPAWNED)
    (warning,) = [message for message in caplog.messages if "zygote" in message]
    assert warning.startswith("The zygote is given up, and engine processes are spawned from now on: ")
    assert "was killed by SIGSEGV" in warning
    assert is_spawned(supervisor)
    assert preload.zygote_pid() is None and not psutil.pid_exists(own_zygote)
    assert [move.state for move in supervisor.lifecycle.history] == [State.STARTING, State.READY]

    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    await until(lambda: supervisor.restarts == 1, SPAWNED)
    assert await Stream(supervisor).end() == TOKENS
    assert is_spawned(supervisor)
    assert [message for message in caplog.messages if "zygote" in message] == [warning]


async def test_an_engine_whose_accelerator_cannot_be_initialised_when_forked_is_spawned(
    own_zygote: int, make_watched: MakeWatched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILURE, "cannot initialise")
    supervisor = await make_watched(method="auto", logits_processors=[FAILS_WHEN_FORKED])
    assert "spawned from now on: The vLLM engine of tiny failed to start: RuntimeError: Cannot re-init" in caplog.text
    assert is_spawned(supervisor)


async def test_an_engine_that_runs_out_of_memory_is_not_started_again_and_the_zygote_is_kept(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FAILURE, "runs out of memory")
    before = preload.zygote_pid()
    supervisor = make_supervisor(logits_processors=[FAILS_WHEN_FORKED])
    with pytest.raises(EngineStartError, match="CUDA error: out of memory"):
        await asyncio.to_thread(supervisor.start)
    assert state(supervisor) is State.FAILED
    assert preload.zygote_pid() == before is not None
    assert "given up" not in caplog.text
