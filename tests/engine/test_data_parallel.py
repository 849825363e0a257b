"""Engines of several data-parallel ranks: vLLM's own ranks, coordinator and waves, which restart as a whole."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import expert_collectives
import psutil
import pytest
from streams import (
    BOUND,
    COORDINATOR,
    ENGINE_CORE,
    EXPERTS,
    TOKENS,
    TWO_RANKS,
    WORKER,
    MakeWatched,
    Stream,
    answered_twice,
    deaths,
    until,
    victim,
    with_fault,
)

from xinf_vllm_backend.demo.tiny_model import make_tiny_moe_model
from xinf_vllm_backend.engine import preload
from xinf_vllm_backend.engine.supervisor import EngineSupervisor

pytestmark = pytest.mark.engine

# In float32 another batch, on another rank, gives the same text.
RANKS: dict[str, Any] = {"data_parallel_size": 2, "dtype": "float32", "environment": TWO_RANKS}
HANG_TIMEOUT = 2.0  # seconds
BEGUN = 10  # tokens after which a stream is under way
LONG = 250  # tokens of one that is still under way when something is done to its engine then
ON_BOTH: dict[str, dict[str, Any]] = {
    "on rank 0": {"rank": 0, "max_tokens": LONG},
    "on rank 1": {"rank": 1, "max_tokens": LONG},
    "anywhere": {},
}

of_both_paths = pytest.mark.parametrize("path", [{}, EXPERTS], ids=["dense", "experts"])


async def answered_though(supervisor: EngineSupervisor, title: str, rank: int | None, how: signal.Signals) -> None:
    """Have both ranks answer while a process of their engine is killed or stopped, as if nothing had happened."""
    before = supervisor.restarts

    async def disturb(streams: dict[str, Stream]) -> None:
        await asyncio.gather(*(streams[name].given(BEGUN) for name in ("on rank 0", "on rank 1")))
        os.kill(victim(supervisor, title, rank), how)

    await answered_twice(supervisor, ON_BOTH, disturb)
    await until(lambda: supervisor.restarts == before + 1)
    assert len(deaths(supervisor)) == before + 1


@of_both_paths
async def test_a_killed_rank_or_coordinator_restarts_the_engine_and_both_ranks_go_on(
    make_watched: MakeWatched, path: dict[str, Any]
) -> None:
    supervisor = await make_watched(**RANKS, **path)
    started = [(process["title"].partition(" ")[0], process["started"]) for process in supervisor.processes()]
    assert len(started) == 5 and {how for _, how in started} == {"forked"}
    assert [title for title, _ in started if title.startswith(COORDINATOR)] == [COORDINATOR]
    assert {psutil.Process(process["pid"]).ppid() for process in supervisor.processes()} == {preload.zygote_pid()}
    assert supervisor._processes is not None
    assert sorted(supervisor._processes.ranks().values()) == [0, 0, 1, 1]

    for title, rank, name in (
        (ENGINE_CORE, 1, "EngineCore_DP1"),
        (WORKER, 1, "Worker"),
        (COORDINATOR, None, "VLLM_DP_"),
    ):
        old = [psutil.Process(process["pid"]) for process in supervisor.processes()]
        files = supervisor._processes._cleanup
        assert files is not None and files.directory.exists()
        await answered_though(supervisor, title, rank, signal.SIGKILL)
        assert re.search(rf"{name}\S* \(pid \d+\) was killed by SIGKILL", deaths(supervisor)[-1])
        await until(lambda old=old: not [process for process in old if process.is_running()])  # type: ignore[misc]
        await until(lambda files=files: not files.directory.exists())  # type: ignore[misc]
        assert len(supervisor.processes()) == 5


async def test_a_rank_whose_hang_the_outputs_of_another_hide_is_found(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched(**RANKS, hang_timeout=HANG_TIMEOUT)
    (tmp_path / "done").touch()
    fault = with_fault("waits", 40, tmp_path / "done")
    undisturbed = Stream(supervisor, rank=1, **fault)
    await undisturbed.end()
    (tmp_path / "done").unlink()

    async def keep_busy() -> None:
        while not supervisor.restarts:
            assert await Stream(supervisor, rank=0).end() == TOKENS

    busy = asyncio.ensure_future(keep_busy())
    hangs = Stream(supervisor, rank=1, **fault)
    await hangs.end()
    assert hangs.told == undisturbed.told
    await asyncio.wait_for(busy, BOUND)
    (reason,) = deaths(supervisor)
    assert "hangs: for 2 s its rank 1 has given no sign of life and done no work" in reason


async def test_a_stopped_rank_or_coordinator_of_a_dense_model_is_found_and_both_ranks_go_on(
    make_watched: MakeWatched,
) -> None:
    supervisor = await make_watched(**RANKS, hang_timeout=HANG_TIMEOUT)
    for title, rank, silent in ((ENGINE_CORE, 1, "its rank 1 has"), (COORDINATOR, None, "its coordinator has")):
        await answered_though(supervisor, title, rank, signal.SIGSTOP)
        assert f"hangs: for 2 s {silent} given no sign of life" in deaths(supervisor)[-1]


async def test_a_stopped_rank_or_coordinator_of_experts_is_found_but_not_one_that_computes(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched(**RANKS, **EXPERTS, hang_timeout=HANG_TIMEOUT)
    computes = Stream(supervisor, rank=0, **with_fault("computes", 40, tmp_path / "done"))  # the other waits for it
    waits = Stream(supervisor, rank=1)
    assert await computes.end() == await waits.end() == TOKENS and (tmp_path / "done").exists()
    assert deaths(supervisor) == []

    await answered_though(supervisor, WORKER, 1, signal.SIGSTOP)
    assert "hangs: for 2 s it" in deaths(supervisor)[-1]
    await answered_though(supervisor, COORDINATOR, None, signal.SIGSTOP)
    assert "coordinator has given no sign of life" in deaths(supervisor)[-1]


@pytest.fixture
def experts_on_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engine processes that are started meanwhile load the plugin."""
    info = tmp_path / "expert_collectives-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: expert-collectives\nVersion: 0\n")
    (info / "entry_points.txt").write_text(expert_collectives.ENTRY_POINT)
    monkeypatch.syspath_prepend(tmp_path)
    yield


async def test_experts_shared_by_two_ranks_answer_as_those_of_one_also_after_a_death(
    make_watched: MakeWatched, experts_on_several_ranks: None, tmp_path: Path
) -> None:
    model = str(make_tiny_moe_model(tmp_path / "experts"))
    alone = await make_watched(model=model, dtype="float32")
    expected = Stream(alone)
    await expected.end()
    assert len(set(expected.told[0]["ids"])) > TOKENS // 3  # a text of one token would hide lost ones

    supervisor = await make_watched(model=model, enable_expert_parallel=True, **RANKS)
    streams = [Stream(supervisor, rank=rank) for rank in (0, 1)]
    assert [await stream.end() for stream in streams] == [TOKENS, TOKENS]
    assert [stream.told[0]["ids"] for stream in streams] == [expected.told[0]["ids"]] * 2
    await answered_though(supervisor, ENGINE_CORE, 1, signal.SIGKILL)
