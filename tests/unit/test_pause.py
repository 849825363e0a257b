"""Two-phase pause of one engine: every step in and out of turn, late, twice, and at once with another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from xinf_vllm_backend.engine.admission import Admission, Lets
from xinf_vllm_backend.engine.pause import Control, Order, Stage
from xinf_vllm_backend.errors import BackendError, BadRequestError, ControlError, EngineDiedError, EnginePausedError

BOUND = 10.0  # seconds; only a hang reaches it
SOON = 0.2  # seconds that an order has, of which some are to be used up


class Engine:
    """An engine that notes what it is told, and does it when the test lets it.

    Attributes:
        told: names of the calls, in order.
        stuck: names of those that never return.
        fails: by the name of a call, what it raises.
    """

    def __init__(self) -> None:
        self.name = "tiny"
        self.admission = Admission("tiny")
        self.told: list[Any] = []
        self.stuck: set[str] = set()
        self.fails: dict[str, Exception] = {}
        self.never: str | None = None
        self.reached = asyncio.Event()

    async def _do(self, name: str, *given: Any) -> None:
        self.told.append((name, *given) if given else name)
        self.reached.set()
        if name in self.stuck:
            await asyncio.get_running_loop().create_future()
        if name in self.fails:
            raise self.fails[name]

    def why_not(self, order: Order) -> str | None:
        return self.never

    async def drained(self) -> None:
        await self._do("drained")

    async def freeze(self, mode: str, clear_cache: bool) -> None:
        await self._do("freeze", mode)

    async def thaw(self) -> None:
        await self._do("thaw")

    async def fall_asleep(self, level: int | None) -> None:
        await self._do("fall asleep")

    async def wake(self) -> None:
        await self._do("wake")

    def go_on(self) -> None:
        self.admission.lets = Lets.ALL
        self.told.append("go on")

    def restart(self, reason: str) -> None:
        self.told.append("restart")

    def in_flight(self) -> tuple[int, int]:
        return 3, 1


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def control(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Control:
    monkeypatch.setattr("xinf_vllm_backend.engine.pause.UNDO_TIMEOUT", SOON)
    return Control(engine, hold=30.0)


def at(control: Control) -> Stage:
    return control.stage


def lets(engine: Engine) -> Lets:
    return engine.admission.lets


def order(epoch: int = 1, **given: Any) -> Order:
    return Order.parse({"epoch": epoch, **given})


async def paused(control: Control, epoch: int = 1, **given: Any) -> None:
    await control.prepare(order(epoch, **given))
    await control.commit(epoch)
    await control.confirm(epoch)


async def stage(control: Control, wanted: Stage) -> None:
    async def is_it() -> None:
        while control.stage is not wanted:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(is_it(), BOUND)


class TestPause:
    async def test_the_gate_closes_first_and_the_engine_pauses_then(self, control: Control, engine: Engine) -> None:
        await control.prepare(order(mode="keep"))
        assert lets(engine) is Lets.BEGUN and engine.told == []
        await control.commit(1)
        assert lets(engine) is Lets.NONE and engine.told == [("freeze", "keep")]
        assert at(control) is Stage.COMMITTING
        await control.confirm(1)
        assert at(control) is Stage.PAUSED
        await control.confirm(1)

    async def test_resumed_it_serves_and_forgets(self, control: Control, engine: Engine) -> None:
        kept: list[Any] = []
        control.on_change = kept.append
        await paused(control, mode="keep", hold=5)
        assert engine.admission.hold == 5.0
        await asyncio.gather(control.resume(), control.resume())
        assert engine.told == [("freeze", "keep"), "wake", "wake", "thaw", "go on", "wake", "wake"]
        assert [each and each["mode"] for each in kept] == ["keep", None]
        assert control.status() == {
            "epoch": 1,
            "control": "serving",
            "control_reason": "it was asked to",
            "requests": 3,
            "waiting": 1,
            "order": None,
        }

    async def test_asleep_and_awake(self, control: Control, engine: Engine) -> None:
        await paused(control, action="sleep")
        assert at(control) is Stage.ASLEEP and engine.told == [("freeze", "abort"), "fall asleep"]
        with pytest.raises(ControlError, match="wake it up first"):
            await control.prepare(order(2))
        await control.resume()
        assert at(control) is Stage.SERVING

    async def test_a_wait_drains_first(self, control: Control, engine: Engine) -> None:
        await paused(control, mode="wait")
        assert engine.told == ["drained", ("freeze", "abort")]

    async def test_a_wait_that_lasts_is_rolled_back_or_ends_what_is_in_flight(
        self, control: Control, engine: Engine
    ) -> None:
        engine.stuck = {"drained"}
        await control.prepare(order(mode="wait", timeout=SOON))
        with pytest.raises(ControlError, match=r"2 requests had not ended after 0.2 s.*it is serving again"):
            await asyncio.wait_for(control.commit(1), BOUND)
        assert at(control) is Stage.SERVING and engine.admission.is_open
        await control.prepare(order(2, mode="wait", timeout=1.0, on_timeout="abort"))
        await asyncio.wait_for(control.commit(2), BOUND)
        assert ("freeze", "abort") in engine.told

    async def test_one_that_is_idle_is_woken_by_a_resume(self, control: Control, engine: Engine) -> None:
        await control.resume()
        assert engine.told == ["wake"]


class TestOutOfTurn:
    async def test_an_older_order_is_refused(self, control: Control, engine: Engine) -> None:
        await paused(control, 2)
        await control.resume()
        for late in (1, 2):
            with pytest.raises(ControlError, match=f"{late} is not after 2"):
                await control.prepare(order(late))
        assert engine.admission.is_open

    async def test_one_order_at_a_time(self, control: Control) -> None:
        await control.prepare(order(1))
        with pytest.raises(ControlError, match=r"is preparing.*ask again"):
            await control.prepare(order(2))
        assert control.epoch == 1

    @pytest.mark.parametrize("step", ["commit", "confirm"])
    async def test_a_step_without_the_one_before_is_refused(self, control: Control, step: str) -> None:
        with pytest.raises(ControlError, match="tiny is serving"):
            await getattr(control, step)(1)

    async def test_a_confirmation_of_what_is_being_done_is_refused(self, control: Control, engine: Engine) -> None:
        engine.stuck = {"freeze"}
        await control.prepare(order())
        committing = asyncio.ensure_future(control.commit(1))
        await engine.reached.wait()
        with pytest.raises(ControlError):
            await control.confirm(1)
        await control.roll_back(1, "for the test")
        with pytest.raises(ControlError, match="for the test"):
            await committing

    async def test_a_roll_back_of_another_order_changes_nothing(self, control: Control) -> None:
        await paused(control, 2)
        await control.roll_back(1, "late")
        assert at(control) is Stage.PAUSED

    async def test_what_the_engine_cannot_do_changes_nothing(self, control: Control, engine: Engine) -> None:
        engine.never = "is starting; try again when it is ready"
        with pytest.raises(ControlError, match="tiny is starting"):
            await control.prepare(order())
        assert control.epoch == 0 and engine.admission.is_open


class TestDeadline:
    async def test_what_is_not_committed_serves_again(self, control: Control, engine: Engine) -> None:
        await control.prepare(order(timeout=SOON))
        await stage(control, Stage.SERVING)
        assert engine.admission.is_open and engine.told == ["go on"]
        with pytest.raises(ControlError, match=r"not confirmed within 0.2 s"):
            await control.commit(1)

    async def test_what_is_not_confirmed_serves_again(self, control: Control, engine: Engine) -> None:
        await control.prepare(order(timeout=SOON))
        await control.commit(1)
        await stage(control, Stage.SERVING)
        assert engine.told == [("freeze", "abort"), "wake", "thaw", "go on"]
        with pytest.raises(ControlError):
            await control.confirm(1)

    async def test_a_commit_that_comes_after_it_is_refused_even_before_the_timer(self, control: Control) -> None:
        await control.prepare(order(timeout=SOON))
        control._deadline = 0.0  # as after a stop of this process
        with pytest.raises(ControlError, match="the deadline of 1 has passed"):
            await control.commit(1)

    async def test_an_engine_that_does_not_pause_in_time_is_restarted(self, control: Control, engine: Engine) -> None:
        engine.stuck = {"freeze", "thaw"}
        await control.prepare(order(timeout=SOON))
        with pytest.raises(ControlError, match="serving"):
            await asyncio.wait_for(control.commit(1), BOUND)
        assert "restart" in engine.told and engine.admission.is_open

    async def test_one_that_takes_long_to_wake_is_not(self, control: Control, engine: Engine) -> None:
        engine.stuck = {"wake"}
        await control.prepare(order(action="sleep", timeout=SOON))
        await control.commit(1)
        await stage(control, Stage.SERVING)
        assert "restart" not in engine.told and engine.admission.is_open

    async def test_a_caller_that_leaves_does_not_stop_the_commit(self, control: Control, engine: Engine) -> None:
        await control.prepare(order(timeout=BOUND))
        committing = asyncio.ensure_future(control.commit(1))
        await engine.reached.wait()
        committing.cancel()
        assert control._work is not None
        await asyncio.wait({control._work}, timeout=BOUND)
        await control.confirm(1)
        assert at(control) is Stage.PAUSED


class TestAgain:
    async def test_a_paused_engine_falls_asleep(self, control: Control) -> None:
        await paused(control, 1, mode="keep")
        await paused(control, 2, action="sleep")
        assert at(control) is Stage.ASLEEP

    async def test_it_stays_paused_when_it_cannot_fall_asleep(self, control: Control, engine: Engine) -> None:
        await paused(control, 1, mode="keep", hold=5)
        engine.fails["fall asleep"] = EngineDiedError("It died.")
        await control.prepare(order(2, action="sleep"))
        with pytest.raises(ControlError, match="It died; it is paused again"):
            await control.commit(2)
        assert at(control) is Stage.PAUSED and lets(engine) is Lets.NONE and engine.admission.hold == 5.0

    async def test_what_was_confirmed_is_rolled_back_where_another_engine_failed(
        self, control: Control, engine: Engine
    ) -> None:
        kept: list[Any] = []
        control.on_change = kept.append
        await paused(control, 1, mode="keep")
        await paused(control, 2, action="sleep")
        await control.roll_back(2, "another failed")
        assert at(control) is Stage.PAUSED and lets(engine) is Lets.NONE
        await control.roll_back(2, "another failed")
        await control.roll_back(1, "that as well")
        assert at(control) is Stage.SERVING
        assert [each and each["epoch"] for each in kept] == [1, 2, 1, None]

    async def test_a_resume_ends_what_is_under_way(self, control: Control, engine: Engine) -> None:
        engine.stuck = {"freeze"}
        await control.prepare(order())
        committing = asyncio.ensure_future(control.commit(1))
        await engine.reached.wait()
        await control.resume()
        assert at(control) is Stage.SERVING and engine.admission.is_open
        with pytest.raises(ControlError, match="it was resumed"):
            await committing

    async def test_one_that_cannot_be_woken_says_so(self, control: Control, engine: Engine) -> None:
        await paused(control, action="sleep")
        engine.fails["wake"] = BackendError("There is no memory.")
        with pytest.raises(ControlError, match=r"tiny could not be woken: There is no memory."):
            await control.resume()
        assert at(control) is Stage.ASLEEP


class TestRestored:
    @pytest.mark.parametrize("action, told", [("pause", []), ("sleep", ["fall asleep"])])
    async def test_a_new_process_is_as_the_one_before(
        self, control: Control, engine: Engine, action: str, told: list[str]
    ) -> None:
        control.restore(order(7, action=action, hold=0).as_dict())
        await asyncio.sleep(0)
        assert engine.told == told and control.epoch == 7
        assert lets(engine) is Lets.NONE
        with pytest.raises(EnginePausedError, match="The model tiny is paused"):
            engine.admission.check()
        await control.resume()
        assert at(control) is Stage.SERVING


class TestOrder:
    @pytest.mark.parametrize(
        "given, why",
        [
            ({"mode": "soon"}, "mode='soon' cannot be used"),
            ({"timeout": 0}, "timeout=0 cannot be used"),
            ({"level": 3}, "level=3 cannot be used"),
            ({"hold": -1}, "hold=-1 cannot be used"),
            ({"speed": 1}, "speed=1 cannot be used"),
        ],
    )
    def test_a_bad_value_is_told(self, given: dict[str, Any], why: str) -> None:
        with pytest.raises(BadRequestError, match=why):
            order(**given)

    def test_values_of_a_query_are_understood(self) -> None:
        found = order(timeout="5", hold="0", level="2", clear_cache="false")
        assert (found.timeout, found.hold, found.level, found.clear_cache) == (5.0, 0.0, 2, False)


def test_the_gate_lets_in_what_was_there(make_entry: Callable[..., Any]) -> None:
    gate = Admission("tiny")
    begun, comes = make_entry(held=False), make_entry(held=True)
    gate.close(1.0)
    assert gate.admits(begun) and not gate.admits(comes)
    gate.lets = Lets.NONE
    assert not gate.admits(begun)
    gate.close(2.0)
    assert not gate.admits(begun)


@pytest.fixture
def make_entry() -> Callable[..., Any]:
    from xinf_vllm_backend.engine.journal import Entry

    return lambda held: Entry("a", "a", None, None, held=held)
