"""An engine that pools, without Xinference."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from streams import BOUND, Make, until

from xinf_vllm_backend.demo.tiny_pooling import make_tiny_encoder
from xinf_vllm_backend.errors import EnginePausedError

pytestmark = pytest.mark.engine


async def embed(engine: Any, text: str, request_id: str) -> list[float]:
    from vllm import PoolingParams

    output = None
    async for found in engine.encode(text, PoolingParams(task="embed"), request_id):
        output = found
    assert output is not None
    vector: list[float] = output.outputs.data.tolist()
    return vector


@pytest.fixture
async def engine(make_supervisor: Make, tmp_path: Path) -> Any:
    model = make_tiny_encoder(tmp_path / "encoder")
    supervisor = make_supervisor(model=str(model), runner="pooling")
    await asyncio.to_thread(supervisor.start)
    return supervisor


async def test_a_request_that_is_aborted_gets_an_error_and_no_vector(engine: Any) -> None:
    expected = await embed(engine, "the keeper", "first")
    assert len(expected) == 128
    core = next(each["pid"] for each in engine.processes() if each["title"] == "VLLM::EngineCore")
    os.kill(core, signal.SIGSTOP)
    try:
        held = asyncio.create_task(embed(engine, "the keeper", "held"))
        await until(lambda: engine.requests() > 0)
        await engine.abort("held")
        with pytest.raises(EnginePausedError, match="was ended by an order to pause"):
            await asyncio.wait_for(held, BOUND)
    finally:
        os.kill(core, signal.SIGCONT)
    assert await asyncio.wait_for(embed(engine, "the keeper", "last"), BOUND) == pytest.approx(expected, abs=1e-5)
