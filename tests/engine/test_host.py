"""One model actor's engine, hosted without a cluster: real classes of Xinference, a real engine."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from packaging.specifiers import SpecifierSet
from streams import BOUND

from xinf_vllm_backend.demo.tiny_model import model_registration
from xinf_vllm_backend.engine.death import Death
from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.errors import (
    BackendError,
    BadLaunchArgumentError,
    BadRequestError,
    EngineStartTimeoutError,
    EngineStoppedError,
    UnsupportedVersionError,
)
from xinf_vllm_backend.plugin import pickling, replica_log
from xinf_vllm_backend.plugin.cluster_link import DEATHS, RESTARTS
from xinf_vllm_backend.settings import Settings

pytestmark = pytest.mark.engine


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model for "tiny", as the model process has it before ``load()``."""
    monkeypatch.setattr("xinference.constants.XINFERENCE_HOME", str(tmp_path))
    from xinference.model.llm.llm_family import CustomLLMFamilyV2

    from xinf_vllm_backend.plugin.vllm.models import HostedVLLMChatModel

    family = CustomLLMFamilyV2.parse_obj(model_registration("tiny", tiny_model))
    monkeypatch.setattr(replica_log, "_replicas", {})
    yield HostedVLLMChatModel("tiny-rep0", family, str(tiny_model), {"enforce_eager": True, "max_restarts": 1})
    assert replica_log.flush(BOUND)


def test_an_xinference_outside_the_range_is_refused_in_the_worker(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xinf_vllm_backend.plugin.xinference_version.SUPPORTED", SpecifierSet("<4"))
    with pytest.raises(UnsupportedVersionError, match="is outside the range <4"):
        type(model)("tiny-rep1", model.model_family, model.model_path, {})


async def chat(model: Any, tokens: int) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    return await model.async_chat(messages, generate_config={"max_tokens": tokens})


async def test_a_model_loads_serves_is_watched_and_gives_up_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("xinf_vllm_backend.plugin.hosted.os._exit", ended.put_nowait)  # or the test would end with it
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


class Link:
    """What the cluster was told."""

    def __init__(self) -> None:
        self.counts: list[str] = []
        self.last_words: list[str] = []

    async def announce(self, text: str, *, error: bool = False) -> None:
        pass

    async def announce_death(self, reason: str, *, count: bool) -> None:
        self.last_words.append(reason)
        if count:
            await self.count(DEATHS)

    async def count(self, metric: str) -> None:
        self.counts.append(metric)


@pytest.fixture
async def unstarted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose engine is READY to all appearance, has no process, and tells a ``Link``; it cannot end the test."""
    monkeypatch.setattr("xinf_vllm_backend.plugin.hosted.os._exit", lambda status: None)
    model._settings = Settings()
    model._link, model._loop = Link(), asyncio.get_running_loop()
    model._engine = model._make_supervisor(None)
    model._engine.lifecycle.move(State.STARTING, "it was launched")
    model._engine.lifecycle.move(State.READY, "it was started")
    return model


def test_the_load_of_xinferences_own_engine_is_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    model._n_worker, model._settings, model._load_started = 2, Settings(load_timeout=1), 0.0
    model._loading_thread = threading.Thread(target=never.wait, daemon=True)
    model._loading_thread.start()
    with pytest.raises(EngineStartTimeoutError, match="was not ready after 1 s; raise load_timeout"):
        model.wait_for_load()
    never.set()


async def test_a_death_that_no_restart_mends_is_one_death(unstarted: Any) -> None:
    engine = unstarted._engine
    engine.lifecycle.move(State.RESTARTING, "It was killed", Death("It was killed"))
    engine._give_up("It was killed; it could not be restarted")
    await unstarted.engine_died()
    status = await unstarted.engine_status()
    assert status["deaths"] == 1
    assert status["last_error"]["reason"].startswith("It was killed; it could not be restarted")
    assert unstarted._link.counts == [DEATHS]
    assert unstarted._link.last_words == [status["last_error"]["reason"]]


async def test_a_death_after_a_restart_is_a_second_one(unstarted: Any) -> None:
    engine = unstarted._engine
    engine.lifecycle.move(State.RESTARTING, "It was killed", Death("It was killed"))
    engine.lifecycle.move(State.READY, "it was restarted")
    engine._give_up("It was killed again")
    await unstarted.engine_died()
    status = await unstarted.engine_status()
    assert status["deaths"] == 2
    assert unstarted._link.counts == [DEATHS, RESTARTS, DEATHS]


async def test_a_home_on_a_disk_that_hangs_stops_neither_the_loop_nor_the_engine(
    unstarted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(replica_log, "_replicas", {})  # as in a model process that has just been made
    monkeypatch.setattr(replica_log, "_read", lambda path: goes_on.wait(BOUND) and replica_log.ReplicaLog())
    unstarted._engine.lifecycle.move(State.RESTARTING, "It was killed", Death("It was killed"))
    asked = asyncio.create_task(unstarted.engine_status())
    try:
        await asyncio.sleep(0)  # it begins, on this loop
        assert not asked.done()
    finally:
        goes_on.set()
    assert (await asyncio.wait_for(asked, BOUND))["last_error"]["reason"] == "It was killed"


async def test_a_home_on_a_full_disk_costs_a_log_line(
    unstarted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, log: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replica_log, "_write", full)
    unstarted._engine.lifecycle.move(State.RESTARTING, "It was killed", Death("It was killed"))
    unstarted._engine.lifecycle.move(State.READY, "it was restarted")
    assert await asyncio.to_thread(replica_log.flush, BOUND)
    status = await unstarted.engine_status()
    assert (status["state"], status["deaths"]) == ("ready", 1)
    assert "No space left on device" in caplog.text
    await asyncio.to_thread(unstarted.stop)
    assert unstarted._engine.lifecycle.state is State.STOPPED


def test_xinferences_static_methods_are_static_here_too(model: Any) -> None:
    from xinference.model.llm.vllm.core import VLLMModel

    for config in ({}, {"max_tokens": 5, "lora_name": "any"}, {"guided_json": {"type": "object"}}):
        expected = VLLMModel._sanitize_generate_config(dict(config))
        assert type(model)._sanitize_generate_config(dict(config)) == expected
        assert model._sanitize_generate_config(dict(config)) == expected
    with pytest.raises(BadRequestError, match="guided_json"):
        type(model)._sanitize_generate_config({"guided_json": True})


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, None, "auto"),
        ({}, "spawn", "spawn"),  # as --env gives it: to the model process alone
        ({"engine_start_method": "zygote"}, "spawn", "zygote"),
    ],
)
def test_how_engines_are_started_is_settled_in_the_model_process(
    tiny_model: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    environment: str | None,
    expected: str,
) -> None:
    monkeypatch.delenv("XINF_VLLM_START_METHOD", raising=False)
    made = type(model)("tiny-rep0", model.model_family, str(tiny_model), dict(options))
    pickled = cloudpickle.dumps(made)
    started = []
    monkeypatch.setattr(pickling.preload, "start_zygote", lambda method, path: started.append((method, path)))
    monkeypatch.setattr(pickling.engine_log, "include_our_loggers", lambda: None)
    monkeypatch.setattr(pickling.gc, "freeze", lambda: None)
    monkeypatch.setattr("sys.argv", ["xoscar", pickling.SUB_POOL])
    if environment is not None:
        monkeypatch.setenv("XINF_VLLM_START_METHOD", environment)
    assert pickle.loads(pickled)._options == options
    assert started == [(expected, str(tiny_model))]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"xinference_vllm_executor_backend": "xoscar"}, "not supported"), ({"n_worker": 2}, "n_worker=2 needs GPUs")],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    model: Any, tiny_model: Path, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadLaunchArgumentError, match=expected):
        type(model)("tiny-rep1", model.model_family, str(tiny_model), arguments)


def test_lora_modules_have_the_parameter_that_xinference_looks_for(model: Any, tiny_model: Path) -> None:
    assert "peft_model" in inspect.signature(type(model).__init__).parameters
    modules = [object()]
    made = type(model)("tiny-rep1", model.model_family, str(tiny_model), {}, modules)
    assert made.lora_modules is modules


async def test_a_model_directory_that_lacks_its_config_is_refused(model: Any, tmp_path: Path) -> None:
    model.model_path = str(tmp_path)
    with pytest.raises(BadLaunchArgumentError, match=r"holds no config\.json"):
        await asyncio.to_thread(model.load)
