"""One model actor's engine, hosted without a cluster: real classes of Xinference, a real engine."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from streams import BOUND

from xinf_vllm_backend.demo.tiny_model import model_registration
from xinf_vllm_backend.errors import BackendError, EngineStoppedError

pytestmark = pytest.mark.engine


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model for "tiny", as the model process has it before ``load()``."""
    monkeypatch.setattr("xinference.constants.XINFERENCE_HOME", str(tmp_path))
    from xinference.model.llm.llm_family import CustomLLMFamilyV2

    from xinf_vllm_backend.plugin.vllm.models import HostedVLLMChatModel

    family = CustomLLMFamilyV2.parse_obj(model_registration("tiny", tiny_model))
    return HostedVLLMChatModel("tiny-rep0", family, str(tiny_model), {"enforce_eager": True, "max_restarts": 1})


async def chat(model: Any, tokens: int) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    return await model.async_chat(messages, generate_config={"max_tokens": tokens})


async def test_a_model_loads_serves_is_watched_and_gives_up_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("xinf_vllm_backend.plugin.host.os._exit", ended.put_nowait)  # or the test would end with it
    before = dict(os.environ)

    await asyncio.to_thread(model.load)
    assert (await chat(model, 3))["usage"]["completion_tokens"] == 3  # load() returned, so it serves
    assert os.environ == before  # spawn was forced without a trace
    task = model._check_health_task
    assert task is None

    model.set_loop(loop)
    await asyncio.to_thread(model.wait_for_load)
    await asyncio.sleep(0)  # the task was handed to this loop
    task = model._check_health_task
    assert isinstance(task, asyncio.Task) and not task.done()

    def engine_core() -> int:
        return next(int(p["pid"]) for p in model._engine.processes() if p["title"] == "VLLM::EngineCore")

    killed = engine_core()
    os.kill(killed, signal.SIGKILL)
    assert (await asyncio.wait_for(chat(model, 3), BOUND))["usage"]["completion_tokens"] == 3  # from another engine
    status = await model.engine_status()
    assert (status["state"], status["restarts"], status["deaths"]) == ("ready", 1, 1)
    assert f"(pid {killed}) was killed by SIGKILL" in status["last_error"]["reason"]

    os.kill(engine_core(), signal.SIGKILL)  # the one restart there was is used up
    with pytest.raises(BackendError):  # whether it notices the death itself or comes while the process gives up
        await asyncio.wait_for(chat(model, 3), BOUND)
    assert await asyncio.wait_for(ended.get(), BOUND) == 1
    assert ended.empty()  # the health task and the request gave up together
    assert model._engine.processes() == []
    assert (await model.engine_status())["deaths"] == 2


async def test_stop_cancels_the_health_task_and_may_be_called_again(model: Any) -> None:
    model.set_loop(asyncio.get_running_loop())
    model.model_family.address = None
    model._link = None
    await asyncio.to_thread(model.stop)  # before there is anything to stop
    assert model.is_stopping()
    with pytest.raises(EngineStoppedError, match="stopped while it was loading"):
        await asyncio.to_thread(model.load)
