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


async def embed(engine: Any, text: Any, request_id: str) -> list[float]:
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


async def test_texts_are_rendered_as_vllm_does(engine: Any) -> None:
    texts = ["the keeper", "of the light", "x", "a dog " * 40]
    found = await asyncio.gather(*(embed(engine, text, f"ours-{text}") for text in texts))
    for text, vector in zip(texts, found, strict=True):
        assert vector == pytest.approx(await embed(engine.llm, text, f"stock-{text}"), abs=1e-4)
    ids = engine.llm.get_tokenizer().encode(texts[0])
    assert await embed(engine, {"prompt_token_ids": ids}, "ids") == pytest.approx(found[0], abs=1e-4)
    for bad in ("a dog " * 5000, {"prompt_token_ids": [1] * 5000}, ""):
        said = []
        for side, name in ((engine.llm, "stock"), (engine, "ours")):
            try:
                said.append(repr(await embed(side, bad, f"{name}-{len(bad)}")))
            except Exception as error:  # whatever vLLM raises
                said.append(repr(error))
        assert said[0] == said[1]
