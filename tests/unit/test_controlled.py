"""What a model actor does with what it is told of pauses, with a control that is a stub."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from xinf_vllm_backend.errors import BadRequestError, ControlError
from xinf_vllm_backend.plugin import controlled
from xinf_vllm_backend.plugin.replica_log import ReplicaLog

BOUND = 10.0  # seconds; reached only by what hangs
RECORD = {"epoch": 3, "action": "pause"}


class Control:
    """In place of the engine's.

    Attributes:
        calls: what it was told, with the thread that told it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[threading.Thread] = set()
        self.state, self.epoch = "serving", 0
        self.fails: Exception | None = None

    def _told(self, *call: Any) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread())
        if self.fails is not None:
            raise self.fails

    def status(self) -> dict[str, Any]:
        order = None if self.state == "serving" else {"epoch": self.epoch}
        return {"control": self.state, "epoch": self.epoch, "order": order, "control_reason": "", "waiting": 0}

    async def prepare(self, order: Any) -> None:
        self._told("prepare", order.epoch, order.mode)
        self.state, self.epoch = "preparing", order.epoch

    async def commit(self, epoch: int) -> None:
        self._told("commit", epoch)
        self.state = "committing"

    async def confirm(self, epoch: int) -> None:
        self._told("confirm", epoch)
        self.state = "paused"

    async def roll_back(self, epoch: int, reason: str) -> None:
        self._told("roll_back", epoch, reason)
        if self.state != "paused":
            self.state = "serving"

    async def resume(self) -> None:
        self._told("resume")
        self.state = "serving"

    def restore(self, record: Any) -> None:
        self._told("restore", record)


class Engine:
    """In place of the supervisor of an engine."""

    def __init__(self, control: Control) -> None:
        self.control = control


class Model(controlled.Controlled):
    def __init__(self, engine: Any) -> None:
        self.raw_model_uid = "tiny-rep0"
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Control:
    """That of ``model``."""
    monkeypatch.setattr(controlled, "EngineSupervisor", Engine)
    return Control()


@pytest.fixture
def flushed(control: Control, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the control was when the disk was waited for."""
    made: list[str] = []
    monkeypatch.setattr(controlled.replica_log, "flush", lambda: made.append(control.state))
    return made


@pytest.fixture
def model(control: Control, flushed: list[str]) -> Model:
    return Model(Engine(control))


async def test_a_pause_is_prepared_committed_and_on_disk_when_it_is_confirmed(
    model: Model, control: Control, flushed: list[str]
) -> None:
    assert (await model.prepare_pause({"epoch": 1, "mode": "keep"}))["control"] == "preparing"
    assert (await model.commit_pause(1))["control"] == "committing"
    assert flushed == []
    assert (await model.confirm_pause(1))["control"] == (await model.control_status())["control"] == "paused"
    assert flushed == ["paused"]
    assert (await model.resume_engine())["control"] == "serving"
    assert flushed == ["paused", "serving"]
    assert control.calls == [("prepare", 1, "keep"), ("commit", 1), ("confirm", 1), ("resume",)]


async def test_an_order_that_makes_no_sense_is_refused(model: Model, control: Control) -> None:
    with pytest.raises(BadRequestError, match="mode"):
        await model.prepare_pause({"epoch": 1, "mode": "gently"})
    assert control.calls == []


async def test_a_pause_that_is_rolled_back_is_off_the_disk_when_that_is_told(
    model: Model, control: Control, flushed: list[str]
) -> None:
    await model.roll_back_pause(4, "it was taken back")
    assert control.calls == [("roll_back", 4, "it was taken back")] and len(flushed) == 1


async def test_a_model_without_an_engine_yet_cannot_be_paused(flushed: list[str]) -> None:
    model = Model(None)
    for asked in (model.control_status(), model.prepare_pause({"epoch": 1}), model.resume_engine()):
        with pytest.raises(ControlError, match="tiny-rep0 has no engine yet"):
            await asked
    assert controlled.status_of(model._engine)["control"] == "serving"


async def test_what_an_engine_shows_is_what_its_control_says(model: Model) -> None:
    shown = controlled.status_of(model._engine)
    assert shown == {"epoch": 0, "control": "serving", "control_reason": "", "waiting": 0, "order": None}


class TestAPauseOfTheProcessBefore:
    @pytest.fixture
    def paused(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
        monkeypatch.setattr(controlled.replica_log, "read", lambda uid: ReplicaLog(paused=RECORD))
        return model

    async def restored(self, model: Model) -> bool:
        model._loop = asyncio.get_running_loop()
        return await asyncio.wait_for(asyncio.to_thread(model._restore_pause), BOUND)

    async def test_is_taken_up_on_the_event_loop(self, paused: Model, control: Control) -> None:
        assert await self.restored(paused)
        assert control.calls == [("restore", RECORD)]
        assert control.threads == {threading.current_thread()}

    async def test_that_cannot_be_taken_up_is_logged_and_the_model_serves(
        self, paused: Model, control: Control, caplog: pytest.LogCaptureFixture
    ) -> None:
        control.fails = BadRequestError("mode='gently' cannot be used.")
        assert not await self.restored(paused)
        assert "tiny-rep0 could not be paused as it was before its process ended" in caplog.text

    async def test_is_not_where_there_was_none(
        self, model: Model, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(controlled.replica_log, "read", lambda uid: ReplicaLog())
        assert not await self.restored(model)
        assert control.calls == []
