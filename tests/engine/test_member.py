"""One real engine: its start, its death and its stop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from xinf_vllm_backend.engine.member import EngineMember, Phase
from xinf_vllm_backend.errors import EngineStoppedError

pytestmark = pytest.mark.engine

Make = Callable[..., EngineMember]
NOTICED = 2.0  # seconds


async def generate(member: EngineMember, tokens: int) -> Any:
    from vllm import SamplingParams

    async for output in member.generate("The keeper", SamplingParams(max_tokens=tokens, temperature=0), "request"):
        last = output
    return last


async def until_dead(member: EngineMember) -> None:
    while not member.is_dead():
        await asyncio.sleep(0.01)


async def test_two_ranks_are_spawned_serve_and_die_with_a_reason(
    make_member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    phases: list[tuple[Phase, str]] = []
    member = make_member(lambda phase: phases.append((phase, threading.current_thread().name)), tensor_parallel_size=2)
    await asyncio.to_thread(member.start)

    assert list(dict.fromkeys(phase for phase, _ in phases)) == list(Phase)[1:]  # "environment" is the host's
    assert phases[0][1] == "vllm-engine-loader-tiny"
    titles = sorted(process["title"] for process in member.processes())
    assert titles == ["VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"]
    assert len((await generate(member, 5)).outputs[0].token_ids) == 5
    assert not member.is_dead()

    victim = next(process["pid"] for process in member.processes() if process["title"] == "VLLM::Worker_TP1")
    os.kill(victim, signal.SIGKILL)
    await asyncio.wait_for(until_dead(member), NOTICED)
    assert f"VllmWorker-1 (pid {victim}) was killed by SIGKILL" in await asyncio.to_thread(member.death)


async def test_a_stop_while_it_starts_ends_the_start_and_leaves_nothing(
    make_member: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # so that the architecture is inspected anew, in a child
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    member = make_member(lambda phase: phase is Phase.PROCESSES and loop.call_soon_threadsafe(started.set))
    start = asyncio.create_task(asyncio.to_thread(member.start))
    await asyncio.wait_for(started.wait(), 120)
    (engine_core,) = member.processes()
    member_stop = asyncio.create_task(asyncio.to_thread(member.stop, 5))
    with pytest.raises(EngineStoppedError, match="stopped while it was starting"):
        await asyncio.wait_for(start, 30)
    await asyncio.wait_for(member_stop, 30)
    assert not psutil.pid_exists(engine_core["pid"])
    await asyncio.to_thread(member.stop, 5)  # again, from a state in which nothing is left to do
