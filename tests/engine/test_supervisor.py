"""One real engine: its start, its death and its stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from streams import BOUND, Make, until, victim

from xinf_vllm_backend.engine import preload, processes
from xinf_vllm_backend.engine.phase import Phase
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import EngineStartError, EngineStartTimeoutError, EngineStoppedError
from xinf_vllm_backend.process.launch_lock import DeviceLocks

pytestmark = pytest.mark.engine


async def generate(supervisor: EngineSupervisor, tokens: int) -> Any:
    from vllm import SamplingParams

    async for output in supervisor.generate("The keeper", SamplingParams(max_tokens=tokens, temperature=0), "request"):
        last = output
    return last


async def test_two_ranks_serve_and_die_with_a_reason(make_supervisor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    phases: list[tuple[Phase, str]] = []
    supervisor = make_supervisor(
        lambda phase: phases.append((phase, threading.current_thread().name)), tensor_parallel_size=2
    )
    await asyncio.to_thread(supervisor.start)

    assert list(dict.fromkeys(phase for phase, _ in phases)) == list(Phase)[1:]  # "environment" is the host's
    assert phases[0][1] == "vllm-engine-loader-tiny"
    titles = sorted(process["title"] for process in supervisor.processes())
    assert titles == ["VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"]
    assert len((await generate(supervisor, 5)).outputs[0].token_ids) == 5
    assert not supervisor.is_dead()

    killed = victim(supervisor, "VLLM::Worker_TP1")
    os.kill(killed, signal.SIGKILL)
    await until(supervisor.is_dead)
    assert f"VllmWorker-1 (pid {killed}) was killed by SIGKILL" in await asyncio.to_thread(supervisor.death)


async def test_engines_start_side_by_side_each_with_its_own_environment(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at once: the environment of this process is at no moment other than before."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # so that a function can be sent to a Worker
    from vllm.v1.engine import async_llm  # noqa: F401 - when it is imported, vLLM does set variables

    differing: list[object] = []
    elsewhere = ThreadPoolExecutor(1)

    def watch(phase: Phase) -> None:
        differing.extend(elsewhere.submit(dict, os.environ).result(10).items() ^ before.items())

    names = [f"{number}" for number in range(8)]
    supervisors = [
        make_supervisor(watch, environment={"XINF_VLLM_TEST_DEVICES": name}, dtype="float32") for name in names
    ]
    before = dict(os.environ)
    await asyncio.gather(*(asyncio.to_thread(supervisor.start) for supervisor in supervisors))
    for name, supervisor in zip(names, supervisors, strict=True):
        assert await supervisor.collective_rpc(lambda worker: os.environ["XINF_VLLM_TEST_DEVICES"]) == [name]
    assert differing == []
    assert dict(os.environ) == before
    texts = [(await generate(supervisor, 5)).outputs[0].text for supervisor in supervisors]
    assert len(set(texts)) == 1


async def test_two_engines_of_one_process_become_ready_at_the_same_moment(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM registers its metrics in two steps; two engines at once between these were one too many."""
    from vllm.v1.metrics import loggers

    both, unregister = threading.Barrier(2), loggers.unregister_vllm_metrics

    def unregister_and_meet() -> None:
        unregister()
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(2)  # seconds; nobody else comes where it is one at a time

    monkeypatch.setattr(loggers, "unregister_vllm_metrics", unregister_and_meet)
    await asyncio.gather(*(asyncio.to_thread(make_supervisor().start) for _ in range(2)))


async def test_a_failure_of_vllm_in_this_process_is_not_taken_for_the_death_of_an_engine_process(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM ends EngineCore, which was ready, when what comes after it fails."""
    from vllm.v1.engine import async_llm

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no room for metrics")

    monkeypatch.setattr(async_llm, "StatLoggerManager", fail)
    with pytest.raises(EngineStartError, match="failed to start: ValueError: no room for metrics"):
        await asyncio.to_thread(make_supervisor().start)


async def test_a_launch_does_not_wait_for_the_handshake_of_another(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-omni's PR 2717: while launch 1 is in its handshake, launch 2 spawns; it once waited until 1 was ready."""
    from vllm.v1.engine import utils

    in_handshake, go_on = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    second_spawned = asyncio.Event()
    handshake = utils.wait_for_engine_startup

    def held_up(*args: Any, **kwargs: Any) -> Any:
        if not in_handshake.is_set():
            in_handshake.set()
            assert go_on.wait(2 * BOUND)
        return handshake(*args, **kwargs)

    monkeypatch.setattr(utils, "wait_for_engine_startup", held_up)
    first = asyncio.create_task(asyncio.to_thread(make_supervisor().start))
    assert await asyncio.to_thread(in_handshake.wait, BOUND)

    second = make_supervisor(lambda phase: phase is Phase.READY and loop.call_soon_threadsafe(second_spawned.set))
    await asyncio.wait_for(asyncio.to_thread(second.start), BOUND)  # it needs the lock, and gets it
    assert not first.done()
    go_on.set()
    await asyncio.wait_for(first, BOUND)


async def test_a_launch_whose_device_is_held_says_by_whom(
    make_supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOCK_MARGIN", BOUND)  # it has as long to say so
    held = DeviceLocks(["test-device"], "another")
    held.acquire(1, threading.Event())
    supervisor = make_supervisor(device_locks="test-device", load_timeout=BOUND + 0.5)
    with (
        held,
        pytest.raises(EngineStartTimeoutError, match=rf"test-device, held by another \(pid {os.getpid()}, since"),
    ):
        await asyncio.to_thread(supervisor.start)
    await asyncio.to_thread(make_supervisor(device_locks="test-device").start)  # it was let go


def shared_memory(supervisor: EngineSupervisor) -> set[Path]:
    """What the processes of an engine use of it; others may run engines here too."""
    maps = "".join(Path(f"/proc/{process['pid']}/maps").read_text() for process in supervisor.processes())
    return {path for path in map(Path, re.findall(r"/dev/shm/\S+", maps)) if path.exists()}


def marked(mark: str) -> list[Path]:
    """What bears the mark of an engine in shared memory and in the directory for temporary files."""
    return [path for place in ("/dev/shm", tempfile.gettempdir()) for path in Path(place).glob(f"*{mark}*")]


async def test_a_killed_engine_leaves_no_file_behind(make_supervisor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    supervisor = make_supervisor(tensor_parallel_size=2)
    await asyncio.to_thread(supervisor.start)
    used = shared_memory(supervisor)
    assert [path for path in used if "cpushm" in path.name]  # the names that ranks on a CPU make
    (mark,) = {found[0] for path in used if (found := re.search(r"xvllm[0-9a-f]{8}", path.name))}
    assert marked(mark)
    for process in supervisor.processes():
        with contextlib.suppress(ProcessLookupError):  # it ended with those before it
            os.kill(process["pid"], signal.SIGKILL)
    await until(supervisor.is_dead)
    await asyncio.to_thread(supervisor.stop, 5)
    await until(lambda: not [path for path in used if path.exists()] + marked(mark))


async def test_a_spawned_engine_answers_as_one_of_the_zygote(make_supervisor: Make) -> None:
    spawned, forked = make_supervisor(method="spawn", dtype="float32"), make_supervisor(dtype="float32")
    await asyncio.gather(asyncio.to_thread(spawned.start), asyncio.to_thread(forked.start))
    parents = [psutil.Process(process["pid"]).ppid() for process in forked.processes()]
    assert set(parents) == {preload.zygote_pid()}
    assert psutil.Process(victim(spawned, "VLLM::EngineCore")).ppid() == os.getpid()
    texts = [(await generate(supervisor, 50)).outputs[0].text for supervisor in (spawned, forked)]
    assert texts[0] == texts[1]


async def test_a_stop_while_it_starts_ends_the_start_and_leaves_nothing(
    make_supervisor: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # so that the architecture is inspected again, in a child
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    supervisor = make_supervisor(
        lambda phase: phase is Phase.PROCESSES and loop.call_soon_threadsafe(started.set), method="spawn"
    )
    start = asyncio.create_task(asyncio.to_thread(supervisor.start))
    await asyncio.wait_for(started.wait(), 2 * BOUND)
    begun = supervisor.processes()
    assert begun
    stop = asyncio.create_task(asyncio.to_thread(supervisor.stop, 5))
    with pytest.raises(EngineStoppedError, match="stopped while it was starting"):
        await asyncio.wait_for(start, BOUND)
    await asyncio.wait_for(stop, BOUND)
    assert not [process for process in begun if psutil.pid_exists(process["pid"])]
    await asyncio.to_thread(supervisor.stop, 5)  # again, from a state in which nothing is left to do
