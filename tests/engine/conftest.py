"""Real vLLM engines without Xinference."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from xinf_vllm_backend.demo.tiny_model import make_tiny_model
from xinf_vllm_backend.engine.member import EngineMember, Phase
from xinf_vllm_backend.settings import Settings


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def environment_kept() -> Iterator[None]:
    """vLLM writes into the environment of this process, and later tests start clusters from it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
async def make_member(tiny_model: Path) -> AsyncIterator[Callable[..., EngineMember]]:
    """Make an engine member for the tiny model; each is stopped, and must leave no process, when the test ends."""
    members: list[EngineMember] = []

    def make(on_phase: Callable[[Phase], None] = lambda phase: None, **arguments: Any) -> EngineMember:
        from vllm.engine.arg_utils import AsyncEngineArgs

        defaults = {"model": str(tiny_model), "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
        members.append(EngineMember("tiny", AsyncEngineArgs(**{**defaults, **arguments}), Settings(), on_phase))
        return members[-1]

    yield make
    for member in members:
        await asyncio.to_thread(member.stop, 5)
    await asyncio.sleep(0)  # vLLM closes its sockets on the loop that it served from
    left = [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]
    assert not left
