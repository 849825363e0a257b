"""What many restarts leave in the process that they happen in."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import psutil
import pytest
from streams import ENGINE_CORE, WORKER, Gate, MakeWatched, Stream, until, victim

from xinf_vllm_backend.engine.lifecycle import State

pytestmark = pytest.mark.engine

RESTARTS = 40  # what one leaves is seen twenty times between the first look and the last
LOOKS = 4


async def test_forty_restarts_leave_this_process_as_it_was(make_watched: MakeWatched, tmp_path: Path) -> None:
    supervisor = await make_watched(restart_refill=0.0001, max_restarts=1000)
    this, series = psutil.Process(), []

    def look() -> dict[str, int]:
        return {
            "restarts": supervisor.restarts,
            "files": this.num_fds(),
            "threads": this.num_threads(),
            "tasks": len(asyncio.all_tasks()),
            "processes": len(this.children(recursive=True)),
            "shared memory": sum(name.startswith("xvllm") for name in os.listdir("/dev/shm")),
            "directories": len(list(Path(tempfile.gettempdir()).glob("xvllm*"))),
            "MiB resident": this.memory_info().rss >> 20,
        }

    for number in range(1, RESTARTS + 1):
        gate = Gate(tmp_path / f"{number}", 22)
        stream = Stream(supervisor, max_tokens=30, **gate.params)
        await gate.reached(stream)
        os.kill(victim(supervisor, (ENGINE_CORE, WORKER)[number % 2]), signal.SIGKILL)
        gate.open()
        assert await stream.end() == 30
        if number % (RESTARTS // LOOKS) == 0:
            await until(lambda: supervisor.lifecycle.state is State.READY)
            series.append(look())
            print(series[-1])  # shown when it fails, or by pytest -s
    assert supervisor.restarts == RESTARTS
    first, last = series[0], series[-1]
    assert last["MiB resident"] <= first["MiB resident"] + 20
    for name in ("files", "threads", "tasks", "processes", "shared memory", "directories"):
        assert last[name] <= first[name] + 2, (name, series)
