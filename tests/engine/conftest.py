"""Real vLLM engines without Xinference."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_names import FAULTS
from streams import BOUND, Make, MakeWatched, Stream, until

from xinf_vllm_backend.demo.tiny_model import make_tiny_model
from xinf_vllm_backend.engine import preload
from xinf_vllm_backend.engine.phase import Phase
from xinf_vllm_backend.engine.seams import version
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.settings import Settings

# In bfloat16 the CPU builds from 0.29 on die by SIGILL on some hosts (docs/versions.md).
DTYPE = {} if (version.version() or "").startswith("0.27.") else {"dtype": "float32"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def zygote(tiny_model: Path) -> Iterator[None]:
    """It imports while the first tests run; those that start engines by it wait for it."""
    preload.start_zygote("zygote", str(tiny_model))
    yield
    preload.stop_zygote()


@pytest.fixture(autouse=True)
def environment_kept() -> Iterator[None]:
    """Imports write into the environment of this process, and later tests start clusters from it."""
    with _environment_kept():
        yield


@pytest.fixture(scope="module", autouse=True)
def environment_of_the_module_kept() -> Iterator[None]:
    """So do those of fixtures that last longer than a test."""
    with _environment_kept():
        yield


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
async def make_supervisor(tiny_model: Path) -> AsyncIterator[Make]:
    """Make an engine supervisor for the tiny model; each is stopped, and must leave no process, when the test ends."""
    supervisors: list[EngineSupervisor] = []

    def make(
        on_phase: Callable[[Phase], None] = lambda phase: None,
        method: str = "zygote",
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> EngineSupervisor:
        from vllm.engine.arg_utils import AsyncEngineArgs

        options = {**Settings.options_in(arguments), "engine_start_method": method}
        defaults = {"model": str(tiny_model), "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, **DTYPE}
        engine_args = AsyncEngineArgs(**{**defaults, **arguments})
        settings = Settings.resolve(options)
        spec = EngineSpec("tiny", engine_args, settings, environment or {}, on_phase)
        supervisors.append(EngineSupervisor(spec))
        return supervisors[-1]

    yield make
    await asyncio.gather(*(asyncio.to_thread(supervisor.stop, 5) for supervisor in supervisors))
    await asyncio.sleep(0)  # vLLM closes its sockets on the loop that it served from
    with contextlib.suppress(asyncio.TimeoutError):
        await until(lambda: not left_of(preload.zygote_pid()))
    assert left_of(preload.zygote_pid()) == []


@pytest.fixture
async def make_watched(make_supervisor: Make) -> AsyncIterator[MakeWatched]:
    """Start an engine whose requests may bring faults along, and watch it until the test ends."""
    watching: list[asyncio.Task[str]] = []
    supervisors: list[EngineSupervisor] = []

    async def make(**arguments: Any) -> EngineSupervisor:
        defaults = {"logits_processors": [FAULTS], "max_restarts": 20, "restart_refill": 0.001, "hang_timeout": BOUND}
        supervisor = make_supervisor(**{**defaults, **arguments})
        supervisors.append(supervisor)
        await asyncio.to_thread(supervisor.start)
        watching.append(asyncio.ensure_future(supervisor.watch()))
        await Stream(supervisor, max_tokens=5).end()  # it serves, or "it never did" would pass for "it died"
        return supervisor

    yield make
    for watch in watching:
        watch.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    # Killed: an orderly stop takes two seconds, and the other tests of engines have it.
    await asyncio.gather(*(asyncio.to_thread(supervisor.stop, 0) for supervisor in supervisors))


def left_of(zygote: int | None) -> list[psutil.Process]:
    """Our living descendants, without the zygote itself and multiprocessing's tracker."""
    return [process for process in psutil.Process().children(recursive=True) if _counts(process, zygote)]


def _counts(process: psutil.Process, zygote: int | None) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends just now
        is_tracker = "resource_tracker" in " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and process.pid != zygote and not is_tracker
    return False
