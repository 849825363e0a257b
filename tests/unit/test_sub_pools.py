"""Which sub-pools are forked, from which host zygote, and what happens where they cannot be."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from xinf_vllm_backend.errors import BadLaunchArgumentError
from xinf_vllm_backend.plugin import model_process, sub_pools
from xinf_vllm_backend.plugin.sub_pools import HostZygotes
from xinf_vllm_backend.process.zygote.client import ZygoteUnavailableError
from xinf_vllm_backend.settings import HostSettings

COMMAND = (sys.executable, "-m", "xoscar.backends.indigen", "start_sub_pool", "-sn", "psm_1")


async def stock(*command: str, env: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """What starts a sub-pool as ever."""
    return "as ever", env


class Zygotes:
    """Forks nothing: says what it was asked, and answers as it was told."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.asked: list[tuple[Sequence[str], Mapping[str, str], set[int]]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.is_asked = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []

    def fork(
        self, command: Sequence[str], env: Mapping[str, str], blocked: set[int], cancelled: threading.Event
    ) -> Any:
        self.asked.append((command, env, blocked))
        self.is_asked.set()
        assert self.may_answer.wait(10)
        if self.refusal is not None:
            raise ZygoteUnavailableError(self.refusal)
        self.processes.append(subprocess.Popen(["sleep", "60"]))
        return self.processes[-1]


class Handles:
    """In place of xoscar's class for the processes of sub-pools."""

    @staticmethod
    def spawned(process: Any) -> tuple[str, Any]:
        return "forked", process


@pytest.fixture
def zygotes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zygotes]:
    zygotes = Zygotes()
    monkeypatch.setattr(sub_pools, "_zygotes", zygotes)
    monkeypatch.setattr(sub_pools.Seam, "present", lambda seam: True)
    monkeypatch.setattr(sub_pools.Seam, "owner", lambda seam: Handles)
    yield zygotes
    for process in zygotes.processes:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shared memory that is removed when this process ends."""
    names: list[str] = []
    monkeypatch.setattr(sub_pools.resource_tracker, "register", lambda name, kind: names.append(name))
    monkeypatch.setattr(sub_pools.resource_tracker, "unregister", lambda name, kind: names.remove(name))
    return names


async def launch(**arguments: Any) -> Any:
    """A launch by Xinference's worker, which starts one sub-pool on a task of its own."""

    async def launch_builtin_model(
        self: Any, model_uid: str, model_engine: str | None, model_type: str = "LLM", n_worker: int = 1, **kwargs: Any
    ) -> Any:
        return await asyncio.ensure_future(sub_pools._forking(stock)(*COMMAND, env={"A": "1"}))

    return await sub_pools._marking(launch_builtin_model)("worker", "uid", **arguments)


class TestWhichAreForked:
    @pytest.mark.parametrize(("engine", "kind"), [("vllm", "LLM"), ("vLLM", "embedding"), ("VLLM", "rerank")])
    async def test_a_model_of_ours(self, zygotes: Zygotes, engine: str, kind: str) -> None:
        assert await launch(model_engine=engine, model_type=kind) == ("forked", zygotes.processes[0])
        [(command, environment, blocked)] = zygotes.asked
        assert (command, environment, blocked) == (COMMAND, {"A": "1"}, {signal.SIGINT})

    @pytest.mark.parametrize(
        "other",
        [
            {"model_engine": "transformers"},
            {"model_engine": None},
            {"model_engine": "vllm", "model_type": "audio"},
        ],
        ids=lambda other: "-".join(map(str, other)),
    )
    async def test_no_other(self, zygotes: Zygotes, other: dict[str, Any]) -> None:
        assert await launch(**other) == ("as ever", {"A": "1"})
        assert zygotes.asked == []

    async def test_none_that_no_launch_starts(self, zygotes: Zygotes) -> None:
        assert await sub_pools._forking(stock)(*COMMAND, env={}) == ("as ever", {})

    async def test_a_launch_marks_no_other_task(self, zygotes: Zygotes) -> None:
        await asyncio.gather(launch(model_engine="vllm"), launch(model_engine="sglang"))
        assert len(zygotes.asked) == 1

    async def test_a_refusal_starts_it_as_ever_and_is_logged(
        self, zygotes: Zygotes, caplog: pytest.LogCaptureFixture
    ) -> None:
        zygotes.refusal = "it is not in the mood"
        how, environment = await launch(model_engine="vllm")
        assert (how, environment) == ("as ever", {"A": "1", model_process.SPAWNED_BECAUSE: "it is not in the mood"})
        assert [r.levelno for r in caplog.records if "it is not in the mood" in r.message] == [logging.WARNING]

    async def test_a_xoscar_without_the_handle_starts_it_as_ever(
        self, zygotes: Zygotes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sub_pools.Seam, "present", lambda seam: False)
        assert (await launch(model_engine="vllm"))[0] == "as ever"

    @pytest.mark.parametrize("engine", ["vllm", "sglang"])
    async def test_the_shared_memory_of_a_launch_is_removed_if_the_worker_is_killed_before_it_ends(
        self, zygotes: Zygotes, tracked: list[str], engine: str
    ) -> None:
        zygotes.refusal = "it tells what is tracked meanwhile"
        zygotes.may_answer.clear()
        launching = asyncio.create_task(launch(model_engine=engine))
        if engine == "vllm":
            assert await asyncio.to_thread(zygotes.is_asked.wait, 10)
            assert tracked == ["/psm_1"]
        zygotes.may_answer.set()
        await launching
        assert tracked == []

    async def test_a_launch_that_is_cancelled_meanwhile_leaves_no_process(self, zygotes: Zygotes) -> None:
        zygotes.may_answer.clear()
        task = asyncio.create_task(launch(model_engine="vllm"))
        assert await asyncio.to_thread(zygotes.is_asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        zygotes.may_answer.set()
        while not zygotes.processes:
            await asyncio.sleep(0)
        assert await asyncio.to_thread(zygotes.processes[0].wait, 10) == -signal.SIGKILL


class Worker:
    """Xinference's, of which the model "ours-0" and "other-0" have been launched and nothing else is being launched."""

    def __init__(self) -> None:
        self.terminated: list[str] = []
        self._model_uid_to_launch_args = {
            "ours-0": {"model_uid": "ours-0", "model_type": "LLM", "model_engine": "vLLM", "n_worker": 1},
            "other-0": {"model_uid": "other-0", "model_type": "LLM", "model_engine": "SGLang", "n_worker": 1},
        }

    async def cancel_launch_model(self, model_uid: str) -> str:
        if model_uid != "launching-0":
            raise RuntimeError("Model is not launching, may have launched or not launched yet")
        return "cancelled"

    async def terminate_model(self, model_uid: str) -> None:
        self.terminated.append(model_uid)


class TestCancel:
    cancel = staticmethod(sub_pools._stopping(Worker.cancel_launch_model))

    async def test_a_launch_under_way_is_cancelled_as_ever(self) -> None:
        worker = Worker()
        assert await self.cancel(worker, "launching-0") == "cancelled"
        assert worker.terminated == []

    async def test_a_model_of_ours_that_was_launched_the_moment_before_is_stopped(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = Worker()
        await self.cancel(worker, "ours-0")
        assert worker.terminated == ["ours-0"]
        assert "ours-0 is stopped" in caplog.text

    @pytest.mark.parametrize("uid", ["other-0", "unknown-0"])
    async def test_any_other_is_refused_as_ever(self, uid: str) -> None:
        worker = Worker()
        with pytest.raises(RuntimeError, match="not launching"):
            await self.cancel(worker, uid)
        assert worker.terminated == []


class TestWhichZygote:
    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[FakeZygote]:
        """The host zygotes that were made."""
        made: list[FakeZygote] = []

        def make(python: str, environment: Mapping[str, str], *_: Any) -> FakeZygote:
            made.append(FakeZygote(python, environment))
            return made[-1]

        monkeypatch.setattr(sub_pools.platform, "is_installed", lambda: True)
        monkeypatch.setattr(sub_pools, "HostZygote", make)
        monkeypatch.setattr(sub_pools, "CommandPopen", lambda zygote, *_: zygote)
        return made

    def fork(self, zygotes: HostZygotes, python: str, **environment: str) -> Any:
        return zygotes.fork((python, *COMMAND[1:]), environment, set(), threading.Event())

    def refused(self, zygotes: HostZygotes, python: str, **environment: str) -> str:
        with pytest.raises(ZygoteUnavailableError) as caught:
            self.fork(zygotes, python, **environment)
        return str(caught.value)

    def test_one_of_its_own_python_is_started_once(self, started: list[FakeZygote]) -> None:
        zygotes = HostZygotes(HostSettings())
        zygotes.start()
        assert self.fork(zygotes, sys.executable) is self.fork(zygotes, sys.executable) is started[0]
        assert [zygote.python for zygote in started] == [sys.executable]

    def test_the_first_launch_of_an_environment_is_as_ever_and_the_next_is_forked(
        self, started: list[FakeZygote]
    ) -> None:
        zygotes = HostZygotes(HostSettings())
        assert "first launch" in self.refused(zygotes, "/env/bin/python")
        assert self.fork(zygotes, "/env/bin/python").python == "/env/bin/python"
        assert len(started) == 1

    def test_its_zygote_has_the_variables_of_its_python_and_no_secret_of_the_launch(
        self, started: list[FakeZygote]
    ) -> None:
        self.refused(HostZygotes(HostSettings()), "/env/bin/python", VIRTUAL_ENV="/env", HF_TOKEN="secret")
        assert started[0].environment == {**os.environ, "VIRTUAL_ENV": "/env"}

    def test_the_least_used_goes_when_there_are_too_many(self, started: list[FakeZygote]) -> None:
        zygotes = HostZygotes(HostSettings(host_zygotes=2))
        for python in ("/a", "/b"):
            self.refused(zygotes, python)
        self.fork(zygotes, "/a")
        self.refused(zygotes, "/c")
        assert [zygote.python for zygote in started if zygote.stopped] == ["/b"]

    def test_there_is_none_for_environments_where_their_number_is_0(self, started: list[FakeZygote]) -> None:
        assert "XINF_VLLM_HOST_ZYGOTES is 0" in self.refused(HostZygotes(HostSettings(host_zygotes=0)), "/a")
        assert started == []

    def test_off_is_off(self, started: list[FakeZygote]) -> None:
        zygotes = HostZygotes(HostSettings(host_zygote="off"))
        zygotes.start()
        assert self.refused(zygotes, sys.executable) == self.refused(zygotes, "/a") == "XINF_VLLM_HOST_ZYGOTE is off"
        assert started == []

    def test_there_is_none_of_a_python_without_vllm(
        self, started: list[FakeZygote], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sub_pools.platform, "is_installed", lambda: False)
        zygotes = HostZygotes(HostSettings())
        zygotes.start()
        assert "vLLM is not installed" in self.refused(zygotes, sys.executable)
        assert started == []

    def test_a_command_that_another_program_runs_is_not_forked(self, started: list[FakeZygote]) -> None:
        zygotes = HostZygotes(HostSettings())
        with pytest.raises(ZygoteUnavailableError, match="run by taskset"):
            zygotes.fork(("taskset", "-c", "0-1", *COMMAND), {}, set(), threading.Event())


class FakeZygote:
    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self.python = python
        self.environment = environment
        self.stopped = False

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True


def test_a_bad_value_of_a_variable_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XINF_VLLM_HOST_ZYGOTE", "maybe")
    with pytest.raises(BadLaunchArgumentError, match="XINF_VLLM_HOST_ZYGOTE='maybe'"):
        HostSettings.resolve()
