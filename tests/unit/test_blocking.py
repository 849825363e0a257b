"""What an ``LLM`` gets for its engine: the requests of each call, on its own thread, and no others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.blocking import BlockingEngine, Requests, calling
from xinf_vllm_backend.errors import EngineStoppedError

TIMEOUT = 10.0


class Engine:
    """Answers a prompt when it is told to, and fails for "bad"."""

    def __init__(self) -> None:
        self.name = "tiny"
        self.llm = SimpleNamespace(get_supported_tasks=self._tasks)
        self.model_config = "a configuration"
        self.arrived = threading.Event()
        self.let = asyncio.Event()
        self.left: list[str] = []

    async def _tasks(self) -> tuple[str, ...]:
        return ("embed",)

    async def encode(self, prompt: str, params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        self.arrived.set()
        try:
            if prompt == "held":
                await self.let.wait()
        except asyncio.CancelledError:
            self.left.append(prompt)
            raise
        if prompt == "bad":
            raise ValueError("a bad prompt")
        yield SimpleNamespace(request_id=request_id, prompt=prompt, finished=True)


@pytest.fixture
async def engine() -> Any:
    return Engine()


@pytest.fixture
def blocking(engine: Engine) -> BlockingEngine:
    return BlockingEngine(engine, asyncio.get_event_loop())  # type: ignore[arg-type]


def embed(blocking: BlockingEngine, prompts: list[str], requests: Requests | None = None) -> list[Any]:
    """As an ``LLM`` does it."""
    with calling(requests or Requests()):
        outputs: list[Any] = []
        for number, prompt in enumerate(prompts):
            assert blocking.add_request(str(number), prompt, None, priority=0) == str(number)
        while blocking.has_unfinished_requests():
            outputs += blocking.step()
        return [output.prompt for output in sorted(outputs, key=lambda output: int(output.request_id))]


async def test_a_call_gets_its_own_outputs_whatever_else_runs(engine: Engine, blocking: BlockingEngine) -> None:
    held = asyncio.create_task(asyncio.to_thread(embed, blocking, ["held", "0"]))
    await asyncio.to_thread(engine.arrived.wait, TIMEOUT)
    many = [[f"{call} {number}" for number in range(20)] for call in range(8)]
    found = await asyncio.gather(*(asyncio.to_thread(embed, blocking, prompts) for prompts in many))
    assert found == many
    engine.let.set()
    assert await asyncio.wait_for(held, TIMEOUT) == ["held", "0"]


async def test_what_fails_ends_its_call_and_leaves_nothing(engine: Engine, blocking: BlockingEngine) -> None:
    with pytest.raises(ValueError, match="a bad prompt"):
        await asyncio.to_thread(embed, blocking, ["held", "bad"])
    await asyncio.sleep(0)
    assert await asyncio.to_thread(embed, blocking, ["good"]) == ["good"]
    assert engine.left == ["held"]


async def test_a_call_that_is_cancelled_ends_its_requests(engine: Engine, blocking: BlockingEngine) -> None:
    requests = Requests()
    call = asyncio.create_task(asyncio.to_thread(embed, blocking, ["held"], requests))
    await asyncio.to_thread(engine.arrived.wait, TIMEOUT)
    requests.cancel()
    with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
        await asyncio.wait_for(call, TIMEOUT)
    assert await asyncio.to_thread(embed, blocking, ["good"]) == ["good"]
    assert engine.left == ["held"]


async def test_a_call_that_was_cancelled_before_it_sent_sends_nothing(engine: Engine, blocking: BlockingEngine) -> None:
    requests = Requests()
    requests.cancel()
    with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
        await asyncio.to_thread(embed, blocking, ["held"], requests)
    assert not engine.arrived.is_set()


async def test_an_aborted_request_is_not_waited_for(engine: Engine, blocking: BlockingEngine) -> None:
    def abort() -> list[Any]:
        with calling(Requests()):
            for number in ("0", "1"):
                blocking.add_request(number, "held" if number == "0" else "good", None)
            blocking.abort_request(["0"], internal=True)
            assert blocking.get_num_unfinished_requests() == 1
            return [output.request_id for output in blocking.step()]

    assert await asyncio.to_thread(abort) == ["1"]


async def test_it_is_as_its_engine_otherwise(blocking: BlockingEngine) -> None:
    assert blocking.model_config == "a configuration"
    assert await asyncio.to_thread(blocking.get_supported_tasks) == ("embed",)


def test_a_call_ends_when_its_event_loop_has_ended() -> None:
    loop = asyncio.new_event_loop()
    engine = Engine()
    blocking = BlockingEngine(engine, loop)  # type: ignore[arg-type]
    with pytest.raises((EngineStoppedError, RuntimeError)):
        loop.close()
        embed(blocking, ["held"])
