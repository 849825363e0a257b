"""Pause and resume of several replicas from an API process: all of them or none, whatever fails and whenever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.errors import BadRequestError, ControlError, RequestNotFoundError
from xinf_vllm_backend.plugin import control, two_phases
from xinf_vllm_backend.plugin.control import Controls
from xinf_vllm_backend.plugin.outcome import Outcome

BOUND = 20.0  # seconds; reached only by what hangs
SOON: dict[str, Any] = {"timeout": 0.4}  # of an order that is to run out
PHASES = ("prepare", "commit", "confirm")


class LostError(ConnectionError):
    """What xoscar raises for a process that is gone."""


class Model:
    """A replica as its model actor shows it.

    Attributes:
        before, after: by the name of a call, what it raises or waits for, before or after it has done its work.
        calls: their names, in order.
    """

    def __init__(self, uid: str, epoch: int = 0, state: str = "serving") -> None:
        self.uid, self.epoch, self.state = uid, epoch, state
        self.order: dict[str, Any] = {}
        self.before: dict[str, Exception | asyncio.Event] = {}
        self.after: dict[str, Exception | asyncio.Event] = {}
        self.calls: list[str] = []
        self.on_call: Callable[[str], None] = lambda name: None

    async def _called(self, name: str, work: Callable[[], None] = lambda: None) -> dict[str, Any]:
        self.calls.append(name)
        self.on_call(name)
        await self._act(self.before.get(name))
        work()
        await self._act(self.after.get(name))
        return {"epoch": self.epoch, "control": self.state, "order": self.order}

    async def _act(self, what: Exception | asyncio.Event | None) -> None:
        if isinstance(what, asyncio.Event):
            await what.wait()
        elif what is not None:
            raise what

    async def control_status(self) -> dict[str, Any]:
        return await self._called("status")

    async def prepare_pause(self, order: dict[str, Any]) -> dict[str, Any]:
        def prepare() -> None:
            if self.state in ("preparing", "committing") or order["epoch"] <= self.epoch:
                raise ControlError(f"[address=127.0.0.1:1, pid=1] {self.uid} is {self.state}; ask again later.")
            self.epoch, self.order, self.state = order["epoch"], order, "preparing"

        return await self._called("prepare", prepare)

    async def commit_pause(self, epoch: int) -> dict[str, Any]:
        return await self._called("commit", lambda: self._move(epoch, "preparing", "committing"))

    async def confirm_pause(self, epoch: int) -> dict[str, Any]:
        done = "asleep" if self.order.get("action") == "sleep" else "paused"
        return await self._called("confirm", lambda: self._move(epoch, "committing", done))

    def _move(self, epoch: int, expected: str, state: str) -> None:
        if (self.epoch, self.state) != (epoch, expected):
            raise ControlError(f"{self.uid} is {self.state}.")
        self.state = state

    async def roll_back_pause(self, epoch: int, reason: str) -> dict[str, Any]:
        def back() -> None:
            if epoch == self.epoch:
                self.state = "serving"

        return await self._called("roll_back", back)

    async def resume_engine(self) -> dict[str, Any]:
        return await self._called("resume", lambda: setattr(self, "state", "serving"))


class Replica:
    """One replica, as Xinference knows it; ``process`` is its model actor, or what its worker raises."""

    def __init__(self, process: Any, uid: str = "", status: str = "READY") -> None:
        self.process, self.uid, self.status = process, uid or process.uid, status

    @property
    def serves(self) -> bool:
        return self.status == "READY"

    async def model(self) -> Any:
        if isinstance(self.process, Exception):
            raise self.process
        return self.process


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {name: type(name, (Exception,), {}) for name in ("ActorNotExist", "ServerClosed")}
    put_modules(monkeypatch, {"xoscar": {}, "xoscar.errors": errors})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer at once is not waited for."""
    for module, name in ((two_phases, "ROLL_BACK"), (two_phases, "ASK"), (control, "FIND"), (control, "AGAIN")):
        monkeypatch.setattr(module, name, 0.05)


@pytest.fixture
def models() -> list[Model]:
    return [Model("tiny-rep0", epoch=4), Model("tiny-rep1", epoch=2)]


def controls_of(*replicas: Replica) -> Controls:
    async def find(model_uid: str) -> list[Replica]:
        return list(replicas) if model_uid == "tiny" else []

    return Controls(find)  # type: ignore[arg-type]


async def pause(models: list[Model], action: str = "pause", **given: Any) -> Outcome:
    controls = controls_of(*map(Replica, models))
    return await asyncio.wait_for(controls.pause("tiny", action, given), BOUND)


def states(models: list[Model]) -> list[str]:
    return [model.state for model in models]


class TestAllReplicasPause:
    @pytest.mark.parametrize(("action", "state"), [("pause", "paused"), ("sleep", "asleep")])
    async def test_and_the_answer_says_so(self, models: list[Model], action: str, state: str) -> None:
        outcome = await pause(models, action, mode="keep", hold="0.5")
        assert states(models) == [state, state]
        assert outcome.done
        shown = outcome.as_dict()
        assert (shown["model_uid"], shown["state"], shown["epoch"]) == ("tiny", state, 5)
        assert shown["reason"] == f"All 2 replicas of tiny are {state}."
        assert [each["replica"] for each in shown["replicas"]] == ["tiny-rep0", "tiny-rep1"]
        assert models[1].order["mode"] == "keep" and models[1].order["hold"] == 0.5
        assert models[0].order == models[1].order

    async def test_each_phase_when_all_are_through_the_one_before(self, models: list[Model]) -> None:
        seen: list[str] = []
        for model in models:
            model.on_call = seen.append
        await pause(models)
        assert seen == [name for name in ("status", *PHASES) for _ in models]

    async def test_after_a_pause_that_was_taken_back(self, models: list[Model]) -> None:
        models[1].before["commit"] = ControlError("tiny-rep1 cannot.")
        assert not (await pause(models)).done
        models[1].before.clear()
        assert (await pause(models)).done
        assert [model.epoch for model in models] == [6, 6]


class TestNoneIsPaused:
    @pytest.mark.parametrize("phase", PHASES)
    async def test_where_one_refuses(self, models: list[Model], phase: str) -> None:
        models[1].before[phase] = ControlError("[address=127.0.0.1:1, pid=7] tiny-rep1 has no engine.")
        outcome = await pause(models)
        assert states(models) == ["serving", "serving"]
        assert (outcome.done, outcome.state) == (False, "serving")
        assert outcome.reason == "The pause of tiny was taken back: tiny-rep1 has no engine; tiny is serving now."

    @pytest.mark.parametrize("phase", PHASES)
    async def test_where_the_process_of_one_ends(self, models: list[Model], phase: str) -> None:
        lost = dict.fromkeys((phase, "roll_back", "status"), LostError("gone"))
        models[1].on_call = lambda name: models[1].before.update(lost) if name == phase else None
        outcome = await pause(models)
        assert models[0].state == "serving"
        assert (outcome.done, outcome.state) == (False, "serving")
        assert "tiny-rep1 has lost its process, and is launched again" in outcome.reason

    @pytest.mark.parametrize("phase", PHASES)
    async def test_where_one_does_not_answer_and_it_is_named(
        self, models: list[Model], impatient: None, phase: str
    ) -> None:
        goes_on = asyncio.Event()
        models[1].on_call = lambda name: models[1].before.update(
            dict.fromkeys((phase, "roll_back", "status"), goes_on) if name == phase else {}
        )
        outcome = await pause(models, **SOON)
        assert models[0].state == "serving"
        assert (outcome.done, outcome.state) == (False, "mixed"), "nobody knows"
        assert "tiny-rep1 did not answer within" in outcome.reason
        assert "nobody knows what tiny-rep1 does: it goes back when it answers again, and by itself" in outcome.reason
        assert [each["control"] for each in outcome.replicas] == ["serving", "unknown"]
        goes_on.set()
        await until(lambda: "roll_back" in models[1].calls and models[1].state == "serving")

    async def test_where_one_refuses_to_prepare_it_is_not_told_to_go_back(self, models: list[Model]) -> None:
        models[1].state = "committing"  # something of another's
        outcome = await pause(models)
        assert "roll_back" in models[0].calls and "roll_back" not in models[1].calls
        assert states(models) == ["serving", "committing"]
        assert outcome.state == "committing"

    async def test_and_those_that_take_long_are_not_waited_for_when_one_has_failed(self, models: list[Model]) -> None:
        models[0].before["commit"] = asyncio.Event()  # never
        models[1].before["commit"] = ControlError("tiny-rep1 cannot.")
        outcome = await pause(models, timeout=1000)
        assert states(models) == ["serving", "serving"]
        assert "tiny-rep0" not in outcome.reason

    async def test_while_one_is_being_launched(self, models: list[Model]) -> None:
        first, second = Replica(models[0]), Replica(models[1], status="LOADING")
        outcome = await controls_of(first, second).pause("tiny", "pause", {})
        assert not outcome.done
        assert "tiny-rep1 is being launched (loading, Xinference says); try again when it is ready" in outcome.reason
        assert models[0].calls == ["status"]

    async def test_where_the_process_of_one_has_just_ended(self, models: list[Model]) -> None:
        first, second = Replica(models[0]), Replica(ValueError("Model not found"), "tiny-rep1")
        outcome = await controls_of(first, second).pause("tiny", "pause", {})
        assert not outcome.done and "tiny-rep1 is being launched" in outcome.reason
        assert models[0].calls == ["status"]

    async def test_where_one_does_not_say_how_it_is(self, models: list[Model], impatient: None) -> None:
        models[1].before["status"] = asyncio.Event()
        outcome = await pause(models)
        assert (outcome.done, outcome.state) == (False, "mixed")
        assert "was not begun: tiny-rep1 did not answer within" in outcome.reason
        assert models[0].calls == ["status"]

    async def test_of_an_engine_of_another_kind(self) -> None:
        class Other:
            async def control_status(self) -> None:
                raise AttributeError("'SGLANGModel' object has no attribute 'control_status'")

        outcome = await controls_of(Replica(Other(), "tiny-rep0")).pause("tiny", "pause", {})
        assert (outcome.done, outcome.state) == (False, "serving")
        assert "tiny-rep0 is of an engine that this package does not run" in outcome.reason

    async def test_and_one_that_goes_back_slowly_is_told_of(self, models: list[Model], impatient: None) -> None:
        models[0].before["roll_back"] = asyncio.Event()  # takes longer than is waited for
        models[0].on_call = lambda name: setattr(models[0], "state", "resuming") if name == "roll_back" else None
        models[1].before["commit"] = ControlError("tiny-rep1 cannot.")
        outcome = await pause(models)
        assert (outcome.done, outcome.state) == (False, "resuming")
        assert [each["control"] for each in outcome.replicas] == ["resuming", "serving"]

    async def test_by_a_confirmation_whose_answer_was_lost_with_its_process(
        self, models: list[Model], impatient: None
    ) -> None:
        dead, after = models[1], Model("tiny-rep1", epoch=5, state="paused")  # as the disk said
        replicas = [Replica(models[0]), Replica(dead)]

        def ends(name: str) -> None:
            if name == "confirm":
                dead.before |= dict.fromkeys(("roll_back", "status"), LostError("gone"))
                replicas[1].process = ValueError("Model not found")

        dead.on_call, dead.after["confirm"] = ends, LostError("gone")
        outcome = await controls_of(*replicas).pause("tiny", "pause", {})
        assert (outcome.done, outcome.state, models[0].state) == (False, "serving", "serving")
        replicas[1].process = after
        await until(lambda: after.state == "serving")


class TestTwoAtOnce:
    async def test_in_one_process_the_second_changes_nothing(self, models: list[Model]) -> None:
        controls, goes_on, begun = controls_of(*map(Replica, models)), asyncio.Event(), asyncio.Event()
        models[0].before["commit"] = goes_on
        models[0].on_call = lambda name: begun.set() if name == "commit" else None
        first = asyncio.ensure_future(controls.pause("tiny", "pause", {}))
        await asyncio.wait_for(begun.wait(), BOUND)
        second = await controls.pause("tiny", "sleep", {})
        assert (second.done, second.reason) == (False, "Another pause or sleep of tiny is under way.")
        assert second.state in ("preparing", "committing")
        goes_on.set()
        assert (await first).done
        assert states(models) == ["paused", "paused"]

    async def test_in_two_processes_the_first_wins(self, models: list[Model]) -> None:
        first, second = await asyncio.gather(pause(models), pause(models, "sleep"))
        assert (first.done, second.done) == (True, False)
        assert states(models) == ["paused", "paused"]

    async def test_in_two_processes_of_which_each_comes_first_somewhere_none_is_paused(
        self, models: list[Model]
    ) -> None:
        arrived = asyncio.Event()
        models[1].on_call = lambda name: overtaken(models[1], arrived) if name == "prepare" else None
        first, second = await asyncio.gather(pause(models), pause(models, "sleep"))
        assert (first.done, second.done) == (False, False)
        assert states(models) == ["serving", "serving"]


def overtaken(model: Model, arrived: asyncio.Event) -> None:
    """The first call of ``prepare`` waits until the second is through."""
    if model.calls.count("prepare") == 1:
        model.before["prepare"] = arrived
    else:
        del model.before["prepare"]
        asyncio.get_running_loop().call_soon(arrived.set)


class TestACallerThatLeaves:
    async def test_has_begun_what_goes_on(self, models: list[Model]) -> None:
        controls, goes_on, begun = controls_of(*map(Replica, models)), asyncio.Event(), asyncio.Event()
        models[0].before["commit"] = goes_on
        models[0].on_call = lambda name: begun.set() if name == "commit" else None
        call = asyncio.ensure_future(controls.pause("tiny", "pause", {}))
        await asyncio.wait_for(begun.wait(), BOUND)
        call.cancel()
        await asyncio.wait({call}, timeout=BOUND)
        assert call.cancelled()
        goes_on.set()
        await until(lambda: states(models) == ["paused", "paused"])


class TestResume:
    async def test_of_all_replicas_and_again(self, models: list[Model]) -> None:
        controls = controls_of(*map(Replica, models))
        await controls.pause("tiny", "pause", {})
        for _ in range(2):
            outcome = await controls.resume("tiny")
            assert (outcome.done, outcome.state) == (True, "serving")
            assert outcome.reason == "All 2 replicas of tiny are serving."
        assert states(models) == ["serving", "serving"]

    async def test_of_several_callers_is_one(self, models: list[Model]) -> None:
        controls = controls_of(*map(Replica, models))
        outcomes = await asyncio.gather(*(controls.resume("tiny") for _ in range(5)))
        assert all(outcome.done for outcome in outcomes)
        assert [model.calls.count("resume") for model in models] == [1, 1]

    async def test_waits_for_a_replica_that_is_launched_again(self, models: list[Model], impatient: None) -> None:
        late = Replica(ValueError("Model not found"), "tiny-rep1")
        resuming = asyncio.ensure_future(controls_of(Replica(models[0]), late).resume("tiny"))
        await until(lambda: models[0].calls == ["resume"])
        late.process = models[1]
        assert (await asyncio.wait_for(resuming, BOUND)).done
        assert models[1].calls == ["resume"]

    async def test_reaches_the_next_process_of_one_that_ends_meanwhile(
        self, models: list[Model], impatient: None
    ) -> None:
        dead, after = models[1], Model("tiny-rep1", state="paused")
        dead.before |= dict.fromkeys(("resume", "status"), LostError("gone"))
        replica = Replica(dead)
        dead.on_call = lambda name: setattr(replica, "process", after)
        assert (await controls_of(Replica(models[0]), replica).resume("tiny")).done
        assert after.state == "serving"

    async def test_names_one_that_does_not_answer(self, models: list[Model]) -> None:
        models[1].before["resume"] = asyncio.Event()
        outcome = await controls_of(*map(Replica, models)).resume("tiny", 0.1)
        assert (outcome.done, outcome.state) == (False, "mixed")
        assert "tiny-rep1 did not answer within 0.1 s. It is safe to resume again" in outcome.reason
        assert models[0].state == "serving"

    async def test_names_one_that_cannot_be_woken_and_says_how_it_is(self, models: list[Model]) -> None:
        models[1].state = "asleep"
        models[1].before["resume"] = ControlError("tiny-rep1 could not be woken: no memory.")
        outcome = await controls_of(*map(Replica, models)).resume("tiny")
        assert (outcome.done, outcome.replicas[1]["control"]) == (False, "asleep")
        assert "tiny-rep1 could not be woken: no memory" in outcome.reason

    async def test_names_one_that_was_deleted_meanwhile(self, models: list[Model], impatient: None) -> None:
        replicas = [Replica(models[0]), Replica(ValueError("Model not found"), "tiny-rep1")]

        async def find(model_uid: str) -> list[Replica]:
            return replicas[: 1 if models[0].calls else 2]

        outcome = await Controls(find).resume("tiny")  # type: ignore[arg-type]
        assert (outcome.done, outcome.state) == (False, "serving")
        assert "tiny-rep1 is not there any more" in outcome.reason


class TestWhatCannotBeAsked:
    async def test_a_model_that_does_not_run(self, models: list[Model]) -> None:
        controls = controls_of(*map(Replica, models))
        for asked in (controls.pause("other", "pause", {}), controls.resume("other")):
            with pytest.raises(RequestNotFoundError, match="No model other is running"):
                await asked

    @pytest.mark.parametrize(
        "given", [{"mode": "gently"}, {"timeout": "soon"}, {"timeout": 0}, {"hold": -1}, {"epoch": 7}, {"what": 1}]
    )
    async def test_a_value_that_is_none(self, models: list[Model], given: dict[str, Any]) -> None:
        with pytest.raises(BadRequestError, match=next(iter(given))):
            await controls_of(*map(Replica, models)).pause("tiny", "pause", given)
        assert models[0].calls == []

    async def test_where_xinference_does_not_answer(self, impatient: None) -> None:
        async def find(model_uid: str) -> Any:
            await asyncio.Event().wait()

        with pytest.raises(ControlError, match="does not say which replicas of tiny there are: did not answer"):
            await Controls(find).pause("tiny", "pause", {})


async def until(condition: Callable[[], bool]) -> None:
    async def met() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(met(), BOUND)
