"""How often and how soon a model whose process died is launched again, and when it is given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.plugin import model_watch, relaunch
from xinf_vllm_backend.plugin.cluster_link import GIVEN_UP
from xinf_vllm_backend.plugin.launched import CannotLaunchAgainError
from xinf_vllm_backend.plugin.relaunch import Relaunches, Replica
from xinf_vllm_backend.settings import Settings

TIMEOUT = 30.0  # seconds; only a hang reaches it
UID, OTHER = "tiny-rep0", "other-rep0"
OURS = {"model_uid": UID, "model_type": "LLM", "model_engine": "vLLM", "n_worker": 1}
FOREIGN = {**OURS, "model_uid": OTHER, "model_engine": "SGLang"}


class Worker:
    """As much of Xinference's as the recovery of a model needs.

    Attributes:
        happened: what was done, in order.
        launch: what a launch of a model does; by default it succeeds.
    """

    address = "worker"

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.forgotten: list[str] = []  # deaths
        self.launch: Callable[[], Awaitable[None]] | None = None
        self.terminate: Callable[[], Awaitable[None]] | None = None
        self._model_uid_to_launch_args = {UID: OURS, OTHER: FOREIGN}
        self._model_uid_to_recover_count: dict[str, int | None] = {}
        self._model_uid_to_model: dict[str, Any] = {}
        self.relaunches = Relaunches()
        self.recover_model = self._bound(self.relaunches.recovering(Worker._recover_model))
        self.terminate_model = self._bound(self.relaunches.terminating(Worker._terminate_model))
        self._evict_replica_from_supervisor = self._bound(self.relaunches.evicting(Worker._evict))

    def _bound(self, method: Any) -> Any:
        return lambda *args, **kwargs: method(self, *args, **kwargs)

    async def _recover_model(self, launch_args: dict[str, Any]) -> None:
        self.happened.append(f"launch {launch_args['model_uid']}")
        if self.launch is not None:
            await self.launch()

    async def _terminate_model(self, model_uid: str, is_model_die: bool = False) -> None:
        if self.terminate is not None and not is_model_die:
            await self.terminate()
        self._model_uid_to_model.pop(model_uid, None)
        self._model_uid_to_launch_args.pop(model_uid, None)
        self._model_uid_to_recover_count.pop(model_uid, None)

    async def _evict(self, model_uid: str) -> None:
        self.happened.append(f"evict {model_uid}")

    async def cancel_launch_model(self, model_uid: str) -> None:
        self.happened.append(f"cancel {model_uid}")

    async def die(self, uid: str = UID) -> None:
        """What Xinference does when a model process has ended."""
        arguments = {UID: OURS, OTHER: FOREIGN}[uid]
        count = self._model_uid_to_recover_count.get(uid)
        self._model_uid_to_launch_args[uid] = arguments
        await self.terminate_model(uid, is_model_die=True)
        if count == 0:
            await self._evict_replica_from_supervisor(uid)
            return
        if count is not None:
            self._model_uid_to_recover_count[uid] = count - 1
        await self.recover_model(arguments)

    async def settled(self) -> None:
        """Wait until nothing is launched again."""
        tasks = [r.task for r in self.relaunches._replicas.values() if r.task is not None]
        await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The events."""
    events: list[str] = []

    class Link:
        def __init__(self, worker: Any, uid: str) -> None: ...

        async def announce(self, text: str, *, error: bool = False) -> None:
            events.append(text)

    monkeypatch.setattr(relaunch, "WorkerLink", Link)
    return events


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the launches were put off; no time passes."""
    waited: list[float] = []

    async def at_once(replica: Replica, delay: float) -> bool:
        waited.append(delay)
        return replica.deleted.is_set()

    monkeypatch.setattr(Replica, "is_deleted_within", at_once)
    return waited


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Worker:
    spawn = SimpleNamespace(spawn_management_task=lambda owner, coroutine: asyncio.ensure_future(coroutine))
    monkeypatch.setattr(relaunch, "SPAWN", SimpleNamespace(owner=lambda: spawn))
    monkeypatch.setattr(model_watch, "watches", model_watch.Watches())
    model_watch.watches._settings[UID] = Settings(max_restarts=2)
    made = Worker()
    monkeypatch.setattr(relaunch.replica_log, "forget", made.forgotten.append)
    return made


async def fails() -> None:
    raise MemoryError("no room for token=hf_secret")


class TestBudget:
    async def test_the_first_launch_is_at_once_and_the_next_are_put_off_until_none_is_left(
        self, worker: Worker, delays: list[float], told: list[str]
    ) -> None:
        for _ in range(3):
            await worker.die()
            await worker.settled()
        assert delays[0] == 0 < delays[1] and len(delays) == 2
        assert worker.happened == [f"launch {UID}"] * 2 + [f"evict {UID}"]
        assert told == [
            f"The model {UID} {GIVEN_UP}its model process ended and its budget of launches is spent (max_restarts: 2, "
            "restart_refill: 60 s); find the cause in the worker's log, then launch the model again."
        ]

    async def test_a_launch_that_fails_is_tried_again_within_the_budget(
        self, worker: Worker, delays: list[float], told: list[str]
    ) -> None:
        async def fails_once() -> None:
            worker.launch = None
            await fails()

        worker.launch = fails_once
        await worker.die()
        await worker.settled()
        assert (worker.happened, told) == ([f"launch {UID}"] * 2, [])

    async def test_a_launch_that_always_fails_ends_in_a_sentence_without_its_cause(
        self, worker: Worker, delays: list[float], told: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        worker.launch = fails
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}"] * 2 + [f"evict {UID}"]
        assert told[0].startswith(f"The model {UID} {GIVEN_UP}it could not be launched again and its budget")
        assert "secret" not in told[0] and "secret" in caplog.text
        assert [r.levelno for r in caplog.records if r.message == told[0]] == [logging.ERROR]

    async def test_a_model_that_may_not_restart_its_engine_in_place_is_launched_again_once(
        self, worker: Worker, delays: list[float]
    ) -> None:
        model_watch.watches._settings[UID] = Settings(max_restarts=0)
        for _ in range(2):
            await worker.die()
            await worker.settled()
        assert worker.happened == [f"launch {UID}", f"evict {UID}"]

    async def test_a_model_that_is_launched_by_a_user_after_it_was_given_up_has_all_of_its_budget(
        self, worker: Worker, delays: list[float], told: list[str]
    ) -> None:
        for _ in range(3):
            await worker.die()
            await worker.settled()
        worker.happened.clear()
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}"] and len(told) == 1

    async def test_a_death_during_the_launch_is_followed_by_another(self, worker: Worker, delays: list[float]) -> None:
        async def dies() -> None:
            worker.launch = None
            await worker.die()

        worker.launch = dies
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}"] * 2


class TestOthers:
    async def test_a_model_of_another_engine_is_launched_as_ever(self, worker: Worker) -> None:
        worker.launch = fails
        with pytest.raises(MemoryError):
            await worker.die(OTHER)
        assert worker.happened == [f"launch {OTHER}"] and not worker.relaunches._replicas

    async def test_no_launch_keeps_xinference_from_finding_other_deaths(self, worker: Worker) -> None:
        launched = asyncio.Event()

        async def waits() -> None:
            await launched.wait()

        worker.launch = waits
        await asyncio.wait_for(worker.die(), TIMEOUT)
        await asyncio.sleep(0)
        launched.set()
        await worker.settled()


class TestXinferencesOwnLimit:
    async def test_holds_for_deaths(self, worker: Worker, delays: list[float], told: list[str]) -> None:
        worker._model_uid_to_recover_count[UID] = 1
        for _ in range(2):
            await worker.die()
            await worker.settled()
        assert worker.happened == [f"launch {UID}", f"evict {UID}"]
        assert len(told) == 1 and relaunch.LIMIT_REACHED in told[0]

    async def test_holds_for_launches_that_fail(self, worker: Worker, delays: list[float], told: list[str]) -> None:
        worker._model_uid_to_recover_count[UID] = 1
        worker.launch = fails
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}", f"evict {UID}"]
        assert len(told) == 1 and relaunch.LIMIT_REACHED in told[0]
        assert UID not in worker._model_uid_to_recover_count, "or the next launch had a smaller one"


class TestDeletion:
    async def test_a_model_that_is_deleted_during_the_delay_is_not_launched(
        self, worker: Worker, told: list[str]
    ) -> None:
        await worker.die()
        await worker.settled()
        await worker.die()
        task = worker.relaunches._replicas[UID].task
        await worker.terminate_model(UID)
        await asyncio.wait_for(task, TIMEOUT)  # type: ignore[arg-type]
        assert (worker.happened, told, worker.relaunches._replicas) == ([f"launch {UID}"], [], {})

    async def test_a_model_that_is_deleted_while_its_dead_process_is_cleared_away_is_not_launched(
        self, worker: Worker
    ) -> None:
        await worker.terminate_model(UID, is_model_die=True)
        await worker.terminate_model(UID)
        await worker.recover_model(OURS)
        assert (worker.happened, worker.relaunches._replicas) == ([], {})

    async def test_a_model_whose_process_ends_while_it_is_deleted_is_not_launched(self, worker: Worker) -> None:
        worker.terminate = worker.die
        await worker.terminate_model(UID)
        assert (worker.happened, worker.relaunches._replicas) == ([], {})

    async def test_a_model_that_is_deleted_is_remembered_by_nothing(self, worker: Worker) -> None:
        await worker.terminate_model(OTHER)
        await worker.terminate_model(UID)
        assert worker.forgotten == [UID], "and no file is touched for a model of another engine"
        assert model_watch.watches.settings(UID) == Settings()

    async def test_a_model_that_is_deleted_while_it_is_launched_ends_that_launch(
        self, worker: Worker, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()
        asked = 0

        async def until_cancelled() -> None:
            begun.set()
            await cancelled.wait()
            raise asyncio.CancelledError("Launch cancelled")

        async def cancel(uid: str) -> None:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise RuntimeError("Model is not launching, may have launched or not launched yet")
            cancelled.set()

        async def refuse_while_it_is_launched() -> None:
            assert cancelled.is_set()

        monkeypatch.setattr(relaunch, "ASK_AGAIN", 0.01)
        monkeypatch.setattr(worker, "cancel_launch_model", cancel)
        worker.launch, worker.terminate = until_cancelled, refuse_while_it_is_launched
        await worker.die()
        task = worker.relaunches._replicas[UID].task
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        await asyncio.wait_for(worker.terminate_model(UID), TIMEOUT)
        await asyncio.wait_for(task, TIMEOUT)  # type: ignore[arg-type]
        assert (worker.happened, told, worker.relaunches._replicas) == ([f"launch {UID}"], [], {})

    async def test_a_model_that_could_not_be_deleted_is_launched(self, worker: Worker) -> None:
        refused = asyncio.Event()

        async def refuse() -> None:
            await refused.wait()
            raise ValueError("it is launching")

        await worker.die()
        await worker.settled()
        worker.terminate = refuse
        deleting = asyncio.ensure_future(worker.terminate_model(UID))
        await asyncio.sleep(0)
        replica = worker.relaunches._replicas[UID]
        launching = asyncio.ensure_future(replica.is_deleted_within(0))
        await asyncio.sleep(0)
        refused.set()
        assert await asyncio.wait_for(launching, TIMEOUT) is False
        with pytest.raises(ValueError, match="it is launching"):
            await deleting


class TestLaunch:
    async def test_one_that_is_cancelled_by_a_user_ends_the_recovery(self, worker: Worker, told: list[str]) -> None:
        async def cancelled() -> None:
            raise asyncio.CancelledError("Launch cancelled")

        worker.launch = cancelled
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}", f"evict {UID}"]
        assert "its launch was cancelled" in told[0]

    async def test_what_one_has_left_that_failed_behind_its_load_is_ended_first(self, worker: Worker) -> None:
        async def fails_once() -> None:
            assert UID not in worker._model_uid_to_model  # Xinference launches none beside it
            if len(worker.happened) == 1:
                worker._model_uid_to_model[UID] = "loaded"
                raise ConnectionError("the supervisor")

        worker.launch = fails_once
        await worker.die()
        await worker.settled()
        assert worker.happened == [f"launch {UID}"] * 2
        assert not worker.relaunches._dying

    async def test_one_that_takes_too_long_is_ended_with_its_process_and_has_failed(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed = asyncio.Event()

        async def until_killed() -> None:
            await closed.wait()
            raise ConnectionError("closed")

        async def cancel(uid: str) -> None:
            closed.set()

        worker.launch = until_killed
        monkeypatch.setattr(worker, "cancel_launch_model", cancel)
        with pytest.raises(TimeoutError, match="longer than"):
            launching = asyncio.ensure_future(worker._recover_model(OURS))
            await relaunch._until_launched(worker, UID, launching, 0.01)


async def test_one_that_cannot_be_launched_again_is_given_up_at_once(
    worker: Worker, told: list[str], delays: list[float]
) -> None:
    async def lonely() -> None:
        raise CannotLaunchAgainError("the others are gone")

    worker.launch = lonely
    await worker.die()
    await worker.settled()
    assert worker.happened == [f"launch {UID}", f"evict {UID}"] and len(delays) == 1
    assert f"{GIVEN_UP}its model process ended, and the others are gone;" in told[-1]


async def test_a_replica_with_a_xavier_cache_is_launched_where_it_can_find_the_others(unused_tcp_port: int) -> None:
    launches: list[Any] = []

    async def launch(worker: Any, launch_args: Any) -> None:
        launches.append(launch_args)

    found = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", unused_tcp_port)
    cached = {**OURS, "xavier_config": {"store_address": "127.0.0.1", "store_port": unused_tcp_port}}
    await relaunch._launch_replica(launch, None, cached)
    found.close()
    await found.wait_closed()
    with pytest.raises(CannotLaunchAgainError, match="rank0"):
        await relaunch._launch_replica(launch, None, cached)
    assert launches == [cached]


async def test_the_others_hear_of_each_death_of_a_replica_with_a_xavier_cache(
    worker: Worker, delays: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[tuple[str, int, int]] = []

    async def leave(worker: Any, replica_uid: str, config: dict[str, Any]) -> None:
        left.append((replica_uid, config["rank"], len(delays)))

    async def found(config: dict[str, Any]) -> None: ...

    monkeypatch.setattr(relaunch.xavier, "leave", leave)
    monkeypatch.setattr(relaunch.xavier, "check_rank0", found)
    monkeypatch.setitem(OURS, "xavier_config", {"rank": 1})
    for _ in range(2):
        await worker.die()
        await worker.settled()
    assert left == [(UID, 1, 0), (UID, 1, 1)]  # before each launch is put off
