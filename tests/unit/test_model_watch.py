"""When a model process hangs, and what its worker does then; the process here is a fake one, and so is the time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from clock import Clock

from xinf_vllm_backend.engine import watch as engine_watch
from xinf_vllm_backend.plugin import model_watch
from xinf_vllm_backend.plugin.model_watch import Watch, Watches
from xinf_vllm_backend.process.stacks import Stack
from xinf_vllm_backend.settings import Settings

TIMEOUT = 30.0  # seconds; only a hang reaches it
HANG = 8.0  # seconds, of the clock that the tests move
PID = 7
STEPS = 100  # after so many the replica is gone


class Model:
    """One replica and its process.

    Attributes:
        on_look: called at each look at the process, and tells whether it is stopped and what CPU it has used.
        looks: how often it was looked at.
    """

    uid = "tiny-rep0"
    pid = PID

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.there = True
        self.steps = 0
        self.watched = True
        self.answers: Callable[[int], Awaitable[None] | None] = lambda beat: None
        self.beats = 0
        self.looks = 0
        self.used: Callable[[int], float] = lambda look: 1.0
        self.stopped = False
        self.killed = False
        self.file: int | None = None
        self.told: list[str] = []
        self.on_stacks: Callable[[], None] = lambda: None

    # as the worker has it

    def is_there(self) -> bool:
        self.clock.now += 1
        self.steps += 1
        return self.there and self.steps <= STEPS

    def is_watched(self) -> bool:
        return self.watched

    async def heartbeat(self) -> Mapping[str, Any]:
        self.beats += 1
        answer = self.answers(self.beats)
        if answer is not None:
            await answer
        return {"settings": Settings(hang_timeout=HANG).model_dump(), "busy_factor": 3.0, "stacks": 5}

    async def announce(self, text: str) -> None:
        self.told.append(text)

    # as it is from outside

    def shows_stacks_by(self, fd: int) -> None:
        self.file = fd

    def look(self) -> tuple[bool, float]:
        self.looks += 1
        return self.stopped, self.used(self.looks)

    def stacks(self) -> list[Stack]:
        self.on_stacks()
        return [Stack(PID, "Model: tiny-rep0", "File ..., line 1 in wait")]

    def kill(self) -> None:
        self.killed = True


def never(beat: int) -> Awaitable[None] | None:
    """The first heartbeat is answered, and no other."""
    return None if beat == 1 else asyncio.get_running_loop().create_future()


@pytest.fixture
def model() -> Model:
    return Model(Clock())


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """The deaths that were recorded."""
    deaths: list[tuple[str, str, Any]] = []
    monkeypatch.setattr(model_watch.replica_log, "record_from_outside", lambda *death: deaths.append(death))
    monkeypatch.setattr(engine_watch.platform, "is_cpu_build", lambda: True)

    async def at_once(delay: float) -> None:
        await asyncio.wait([asyncio.ensure_future(sleep(0.001))])  # threads get their turn

    sleep = asyncio.sleep
    monkeypatch.setattr(model_watch, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": at_once}))
    return deaths


async def watched(model: Model) -> Watch:
    watch = Watch(model, model, interval=1.0, clock=model.clock)  # type: ignore[arg-type]
    await asyncio.wait_for(watch.until_gone(), TIMEOUT)
    return watch


async def test_a_model_process_that_answers_is_never_looked_at(model: Model) -> None:
    await watched(model)
    assert (model.beats, model.looks, model.killed) == (STEPS, 0, False)


async def test_one_that_answers_nothing_and_does_no_work_is_killed_after_its_hang_timeout(
    model: Model, recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model.answers = never
    with caplog.at_level(logging.ERROR):
        await watched(model)
    assert (model.killed, model.looks, model.file) == (True, HANG, 5)
    [(uid, reason, details)] = recorded
    assert uid == "tiny-rep0" and reason == model.told[0]
    assert reason == (
        "The model process of tiny-rep0 (pid 7) hangs: for 8 s it has answered nothing and done no work. It is killed, "
        "and Xinference launches the model again."
    )
    assert details == {
        "stacks": [{"pid": PID, "title": "Model: tiny-rep0", "text": "File ..., line 1 in wait"}],
        "requests": [],
    }
    assert "File ..., line 1 in wait" in caplog.text


async def test_one_that_is_stopped_is_killed_whatever_cpu_it_seems_to_have_used(model: Model) -> None:
    model.answers, model.stopped, model.used = never, True, float
    await watched(model)
    assert (model.killed, model.looks) == (True, HANG)
    assert "it is stopped, as by SIGSTOP" in model.told[0]


async def test_one_that_works_is_killed_when_busy_factor_is_used_up_and_no_earlier(model: Model) -> None:
    model.answers, model.used = never, float
    await watched(model)
    assert (model.killed, model.looks) == (True, 3 * HANG + HANG - 1)
    assert "answered nothing, though it has worked" in model.told[0]


async def test_one_that_answers_in_the_last_moment_is_left_alone(model: Model) -> None:
    waiting: list[asyncio.Future[None]] = []

    def late(beat: int) -> Awaitable[None] | None:
        if beat != 2:
            return None
        waiting.append(asyncio.get_running_loop().create_future())
        return waiting[0]

    loop = asyncio.get_running_loop()
    model.answers = late
    model.on_stacks = lambda: asyncio.run_coroutine_threadsafe(answer(), loop).result(TIMEOUT)

    async def answer() -> None:
        waiting[0].set_result(None)
        await asyncio.sleep(0)

    await watched(model)
    assert not model.killed and model.beats > 2, "it is asked again"


@pytest.mark.parametrize("error", [ConnectionError, EOFError], ids=["connection", "end"])
async def test_a_question_that_does_not_arrive_is_not_answered(model: Model, error: type[Exception]) -> None:
    async def fail() -> None:
        raise error("closed")

    model.answers = lambda beat: None if beat == 1 else fail()
    await watched(model)
    assert model.killed


async def test_an_error_of_the_process_is_an_answer(model: Model) -> None:
    async def fail() -> None:
        raise ValueError("its own")

    model.answers = lambda beat: fail()
    await watched(model)
    assert not model.killed


async def test_one_that_loads_or_is_reloaded_is_not_watched(model: Model) -> None:
    model.answers, model.watched = never, False
    await watched(model)
    assert (model.killed, model.looks) == (False, 0)


async def test_a_worker_that_was_held_up_itself_does_not_count_that_time(model: Model) -> None:
    model.answers = never

    def held_up(look: int) -> float:
        model.clock.now += 1000 if look == 1 else 0
        return 1.0

    model.used = held_up
    await watched(model)
    assert model.looks >= HANG / 2, "a look counts for two intervals at most"


async def test_one_that_has_ended_is_left_to_xinference(model: Model) -> None:
    model.answers = never

    def gone(look: int) -> float:
        raise psutil.NoSuchProcess(PID)

    model.used = gone
    await watched(model)
    assert not model.killed


async def test_a_replica_that_is_gone_when_its_stacks_are_read_is_not_killed(model: Model) -> None:
    model.answers = never
    model.on_stacks = lambda: setattr(model, "there", False)
    await watched(model)
    assert (model.killed, model.told) == (False, [])


def test_a_short_hang_timeout_is_looked_at_more_often(model: Model) -> None:
    watch = Watch(model, model, interval=2.0)  # type: ignore[arg-type]
    watch._apply(Settings(hang_timeout=2.0), 3.0)
    assert watch._interval == 0.5


class Worker:
    """Xinference's, with one model of ours and one of another engine."""

    def __init__(self) -> None:
        ours: dict[str, Any] = {"model_uid": "ours-rep0", "model_type": "LLM", "model_engine": "vLLM", "n_worker": 1}
        self._model_uid_to_launch_args = {"ours-rep0": ours, "other-rep0": {**ours, "model_engine": "SGLang"}}
        self._model_uid_to_model = {"ours-rep0": object(), "other-rep0": object()}
        self._model_uid_to_model_status = {"ours-rep0": SimpleNamespace(model_state="ready")}
        self._model_uid_to_pid = {"ours-rep0": psutil.Process().pid, "other-rep0": psutil.Process().pid}

    async def wait_for_load(self, model_uid: str) -> str:
        return f"{model_uid} is loaded"

    async def __pre_destroy__(self) -> None: ...


class TestWhichAreWatched:
    @pytest.fixture
    def watches(self, monkeypatch: pytest.MonkeyPatch) -> Watches:
        async def until_gone(watch: Watch, on_settings: Any) -> None:
            on_settings(Settings(max_restarts=2))
            await asyncio.get_running_loop().create_future()

        monkeypatch.setattr(Watch, "until_gone", until_gone)
        monkeypatch.setattr(model_watch, "watches", Watches())
        return model_watch.watches

    async def test_models_of_ours_are_from_when_they_are_ready_until_the_worker_ends(self, watches: Watches) -> None:
        worker = Worker()
        wait_for_load = model_watch._watching(Worker.wait_for_load)
        assert await wait_for_load(worker, "other-rep0") == "other-rep0 is loaded"
        assert await wait_for_load(worker, "ours-rep0") == "ours-rep0 is loaded"
        assert set(watches._tasks) == {"ours-rep0"}
        task = watches._tasks["ours-rep0"]
        await asyncio.sleep(0)
        await model_watch._ending(Worker.__pre_destroy__)(worker)
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_one_that_was_launched_again_has_one_watch(self, watches: Watches) -> None:
        worker = Worker()
        for _ in range(2):
            await model_watch._watching(Worker.wait_for_load)(worker, "ours-rep0")
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2, "this test and the watch"
        watches.end_all()

    async def test_what_it_told_is_known_until_it_is_forgotten(self, watches: Watches) -> None:
        worker = Worker()
        worker._model_uid_to_launch_args["ours-rep0"]["max_restarts"] = "1"
        watches.begin(worker, "ours-rep0")
        assert watches.settings("ours-rep0").max_restarts == 1, "as the launch gives it"
        await asyncio.sleep(0)
        watches.end("ours-rep0")
        assert watches.settings("ours-rep0").max_restarts == 2
        watches.forget("ours-rep0")
        assert watches.settings("ours-rep0") == Settings()

    async def test_one_whose_process_has_ended_is_not_watched_and_its_launch_goes_on(self, watches: Watches) -> None:
        worker = Worker()
        worker._model_uid_to_pid["ours-rep0"] = 2**22 + 1  # above any that Linux gives
        assert await model_watch._watching(Worker.wait_for_load)(worker, "ours-rep0") == "ours-rep0 is loaded"
        assert watches._tasks == {}

    def test_a_process_that_serves_after_a_reload_is_there_while_it_has_its_sub_pool(self) -> None:
        worker: Any = Worker()
        worker._model_uid_to_subpool_addresses = {"ours-rep0": {"host:1"}}
        generation = model_watch.Generation(worker, "ours-rep0", SimpleNamespace(address="host:1"))
        worker._model_uid_to_model_status["ours-rep0"].model_state = "loading"
        assert generation.is_there() and generation.is_watched()
        worker._model_uid_to_subpool_addresses = {"ours-rep0": {"host:2"}}
        assert not generation.is_there()
        worker._model_uid_to_subpool_addresses = {}
        assert not generation.is_there()

    def test_a_replica_is_there_while_it_is_the_same_model(self) -> None:
        worker = Worker()
        replica = model_watch.Replica(worker, "ours-rep0", worker._model_uid_to_model["ours-rep0"])
        assert replica.is_there() and replica.is_watched()
        worker._model_uid_to_model_status["ours-rep0"].model_state = "loading"
        assert not replica.is_watched()
        worker._model_uid_to_model["ours-rep0"] = object()
        assert not replica.is_there()
