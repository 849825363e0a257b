"""Pause and sleep of one engine in two phases, so that several engines do it together or not at all.

``prepare`` closes the gate and lets the engine step on; ``commit`` ends, drains or freezes what is in flight and pauses
the engine or puts it to sleep; ``confirm`` says that all others have committed, too. Until that a deadline runs, and an
engine that it finds without confirmation serves again by itself. Each order has an epoch, and one that is not above
the last is refused, so of two at once one wins everywhere.

All methods belong to the event loop of the engine's requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BackendError, BadRequestError, ControlError
from .admission import Admission, Lets

logger = logging.getLogger(__name__)

UNDO_TIMEOUT = 10.0  # seconds for a paused engine to serve again; then it is restarted
MARGIN = 0.2  # of an order's time-out that is left for the pause itself when requests have not drained
LONGEST_MARGIN = 5.0  # seconds


class Order(BaseModel):
    """A pause or sleep that is asked for.

    Attributes:
        epoch: higher than that of any order before.
        action: what is asked for.
        mode: what happens to requests in flight: they end with what they have, are waited for, or are kept and go on.
        timeout: seconds from ``prepare`` until ``confirm``.
        on_timeout: what happens when ``mode`` is "wait" and requests have not ended in time.
        hold: seconds that a request which arrives meanwhile waits; 0: it is refused; None: recovery_timeout.
        level: of vLLM's sleep; None: 1 where the model was launched with enable_sleep_mode, else processes end.
        clear_cache: whether the prefix cache is cleared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epoch: int = Field(gt=0)
    action: Literal["pause", "sleep"] = "pause"
    mode: Literal["abort", "wait", "keep"] = "abort"
    timeout: float = Field(60.0, gt=0)
    on_timeout: Literal["abort", "roll_back"] = "roll_back"
    hold: float | None = Field(None, ge=0)
    level: int | None = Field(None, ge=1, le=2)
    clear_cache: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Order:
        """An order from plain data.

        Raises:
            BadRequestError: a value is of the wrong type or out of range.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise BadRequestError(f"{name}={first['input']!r} cannot be used: {first['msg'].lower()}.") from None

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump()


class Stage(str, Enum):
    """How far an engine is with what it was told."""

    SERVING = "serving"
    PREPARING = "preparing"  # the gate is closed, and what is in flight goes on
    COMMITTING = "committing"  # it pauses or falls asleep, or has; not all others are known to have
    PAUSED = "paused"
    ASLEEP = "asleep"
    RESUMING = "resuming"  # it is to serve again


_UNDER_WAY = (Stage.PREPARING, Stage.COMMITTING)
_IN_FORCE = {"pause": Stage.PAUSED, "sleep": Stage.ASLEEP}


class Engine(Protocol):
    """What is paused."""

    name: str

    @property
    def admission(self) -> Admission: ...

    def why_not(self, order: Order) -> str | None:
        """Why ``order`` cannot be carried out, in words behind the engine's name; None if it can."""

    async def drained(self) -> None:
        """Return when no request is in flight but those that the gate holds."""

    async def freeze(self, mode: str, clear_cache: bool) -> None:
        """End what is in flight ("abort") or keep it ("keep"), and return when the engine does not step any more."""

    async def thaw(self) -> None:
        """Have the engine step again."""

    async def fall_asleep(self, level: int | None) -> None: ...

    async def wake(self) -> None:
        """Return at once if it is awake."""

    def go_on(self) -> None:
        """Open the gate, and send what it held."""

    def restart(self, reason: str) -> None:
        """End its processes and start others."""

    def in_flight(self) -> tuple[int, int]:
        """Number of requests, and of those among them that wait."""


class Control:
    """Pause, resume, sleep and wake-up of ``engine``.

    Args:
        engine: to be told.
        hold: seconds that a held request waits where an order does not say.

    Attributes:
        epoch: of the last order.
        stage: how far it is.
        on_change: called with what a new process has to know to be paused as well, as plain data; with None when that
            is over.
    """

    def __init__(self, engine: Engine, hold: float) -> None:
        self._engine = engine
        self._hold = hold
        self.epoch = 0
        self.stage = Stage.SERVING
        self.on_change: Callable[[dict[str, Any] | None], None] = lambda record: None
        self._reason = "nobody has asked for anything else"
        self._order: Order | None = None  # under way or in force
        self._before: Order | None = None  # in force when that came
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._work: asyncio.Task[None] | None = None  # the commit
        self._return: asyncio.Task[None] | None = None  # to serving, or to what was in force before

    def status(self) -> dict[str, Any]:
        """Plain data for operators."""
        requests, waiting = self._engine.in_flight()
        return {
            "epoch": self.epoch,
            "control": self.stage.value,
            "control_reason": self._reason,
            "requests": requests,
            "waiting": waiting,
            "order": None if self._order is None else self._order.as_dict(),
        }

    # -- the two phases

    async def prepare(self, order: Order) -> None:
        """Close the gate; what is in flight goes on.

        Raises:
            ControlError: another order came first or is under way, or the engine cannot do it; nothing has changed.
        """
        why = self._why_not(order)
        if why is not None:
            raise ControlError(f"{self._engine.name} {why}.")
        loop = asyncio.get_running_loop()
        self._before = self._order if self.stage in _IN_FORCE.values() else None
        self.epoch, self._order, self._work = order.epoch, order, None
        self._deadline = loop.time() + order.timeout
        self._timer = loop.call_at(self._deadline, self._expire, order.epoch)
        self._move(Stage.PREPARING, f"the {order.action} {order.epoch} is prepared")
        self._close(order)

    def _why_not(self, order: Order) -> str | None:
        if self.stage in (*_UNDER_WAY, Stage.RESUMING):
            return f"is {self.stage.value} ({self._reason}); ask again when that has ended"
        if order.epoch <= self.epoch:
            return f"has been asked for something else meanwhile ({order.epoch} is not after {self.epoch}); ask again"
        if self.stage is Stage.ASLEEP and order.action == "pause":
            return "is asleep; wake it up first"
        return self._engine.why_not(order)

    def _close(self, order: Order) -> None:
        self._engine.admission.close(self._hold if order.hold is None else order.hold)

    async def commit(self, epoch: int) -> None:
        """Pause or fall asleep; what is not done by the deadline is undone.

        Raises:
            ControlError: it could not be done, or was rolled back; the engine serves again.
        """
        order = self._expect(epoch, Stage.PREPARING)
        self._move(Stage.COMMITTING, f"the {order.action} {epoch} is carried out")
        self._work = work = asyncio.ensure_future(self._carry_out(order))
        await asyncio.wait({work})
        if work.cancelled():  # by the deadline, or by somebody else
            await self._until_returned()
            raise ControlError(f"{self._engine.name} is {self.stage.value}: {self._reason}.")
        error = work.exception()
        if error is None:
            return
        why = _in_words(error)
        await self.roll_back(epoch, why)
        raise ControlError(f"{self._engine.name} did not {order.action}: {why}; it is {self.stage.value} again.")

    async def _carry_out(self, order: Order) -> None:
        mode = await self._drain(order) if order.mode == "wait" else order.mode
        self._engine.admission.lets = Lets.NONE
        await self._in_time(self._engine.freeze(mode, order.clear_cache))
        if order.action == "sleep":
            await self._in_time(self._engine.fall_asleep(order.level))

    async def _drain(self, order: Order) -> str:
        """Wait for what is in flight; how to pause then."""
        left = self._left() - min(LONGEST_MARGIN, MARGIN * order.timeout)
        try:
            await asyncio.wait_for(self._engine.drained(), left)
        except asyncio.TimeoutError:
            if order.on_timeout == "roll_back":
                requests, waiting = self._engine.in_flight()
                raise ControlError(
                    f"{requests - waiting} requests had not ended after {order.timeout:g} s; raise timeout, or use "
                    "on_timeout=abort or another mode"
                ) from None
        return "abort"

    async def _in_time(self, step: Coroutine[Any, Any, None]) -> None:
        try:
            await asyncio.wait_for(step, self._left())
        except asyncio.TimeoutError:
            raise ControlError("its engine did not answer in time") from None

    def _left(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    async def confirm(self, epoch: int) -> None:
        """All have committed, so this is so until it is resumed; safe to repeat.

        Raises:
            ControlError: it was rolled back.
        """
        if epoch == self.epoch and self.stage in _IN_FORCE.values():
            return
        order = self._expect(epoch, Stage.COMMITTING)
        if self._work is None or not self._work.done():
            raise ControlError(f"{self._engine.name} is {self.stage.value}: {self._reason}.")
        self._end_timer()
        self._move(_IN_FORCE[order.action], f"it was asked to, with mode={order.mode}")
        self.on_change(order.as_dict())

    def _expect(self, epoch: int, stage: Stage) -> Order:
        if epoch != self.epoch or self.stage is not stage or self._order is None:
            raise ControlError(f"{self._engine.name} is {self.stage.value}: {self._reason}.")
        if self._left() <= 0:  # this process was held up, and its timer too
            raise ControlError(f"{self._engine.name} serves again: the deadline of {epoch} has passed.")
        return self._order

    # -- back

    async def roll_back(self, epoch: int, reason: str) -> None:
        """Be as before the order ``epoch``, also where that was confirmed; no-op if another came since.

        Another engine may have failed after this one was told that all have committed.
        """
        is_last = self._order is not None and self._order.epoch == epoch
        if is_last and self.stage in (*_UNDER_WAY, *_IN_FORCE.values()):
            self._begin_return(reason, self._undo(reason))
        await self._until_returned()

    async def resume(self) -> None:
        """Serve again, or wake up; safe to repeat, and several at once are one.

        Raises:
            ControlError: the engine could not be woken.
        """
        if self.stage in _UNDER_WAY:
            self._begin_return("it was resumed", self._undo("it was resumed", to_serve=True))
        elif self.stage in _IN_FORCE.values():
            self._begin_return("it was asked to", self._resume(self.stage))
        await self._until_returned()
        await self._engine.wake()  # it may be idle

    def restore(self, record: Mapping[str, Any]) -> None:
        """Be paused or asleep from the start, as ``on_change`` said in the process before."""
        order = Order.parse(record)
        self.epoch, self._order = order.epoch, order
        self._close(order)
        self._engine.admission.lets = Lets.NONE
        self._move(_IN_FORCE[order.action], "it was so when its process ended")
        if order.action == "sleep":
            self._work = asyncio.ensure_future(self._engine.fall_asleep(order.level))

    def _expire(self, epoch: int) -> None:
        order = self._order
        if epoch == self.epoch and self.stage in _UNDER_WAY and order is not None:
            logger.error("The %s of %s was not confirmed within %g s", order.action, self._engine.name, order.timeout)
            reason = f"the {order.action} {epoch} was not confirmed within {order.timeout:g} s"
            self._begin_return(reason, self._undo(reason))

    def _begin_return(self, reason: str, work: Coroutine[Any, Any, None]) -> None:
        self._end_timer()
        self._move(Stage.RESUMING, reason)
        self._return = asyncio.ensure_future(work)

    async def _until_returned(self) -> None:
        if self._return is not None:
            await asyncio.shield(self._return)

    async def _undo(self, reason: str, to_serve: bool = False) -> None:
        """Undo what is under way."""
        had_begun = self._work is not None
        before = None if to_serve else self._before
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work}, timeout=UNDO_TIMEOUT)
        if before is None:
            await self._serve(reason, had_begun or self._before is not None)
            return
        self._order, self._before = before, None
        self._close(before)
        self._engine.admission.lets = Lets.NONE
        if before.action == "pause":
            await self._in_undo_time(self._engine.wake())
        self._move(_IN_FORCE[before.action], reason)
        self.on_change(before.as_dict())

    async def _resume(self, stage: Stage) -> None:
        try:
            await self._engine.wake()
        except BackendError as error:
            self._move(stage, f"it could not be woken: {error}")
            raise ControlError(f"{self._engine.name} could not be woken: {_in_words(error)}.") from None
        await self._serve("it was asked to", True)

    async def _serve(self, reason: str, was_frozen: bool) -> None:
        # An engine that takes long to wake is on its way; one that is awake and does not answer is not.
        is_awake = was_frozen and await self._in_undo_time(self._engine.wake())
        if is_awake and not await self._in_undo_time(self._engine.thaw()):
            self._engine.restart(f"it did not answer when it was to serve again: {reason}")
        self._order = self._before = None
        self._engine.go_on()
        self._move(Stage.SERVING, reason)
        self.on_change(None)

    async def _in_undo_time(self, step: Coroutine[Any, Any, None]) -> bool:
        try:
            await asyncio.wait_for(step, UNDO_TIMEOUT)
        except Exception as error:  # whatever it is, the engine does not do it
            logger.error("%s does not answer: %r", self._engine.name, error)
            return False
        return True

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _move(self, stage: Stage, reason: str) -> None:
        self.stage, self._reason = stage, reason
        logger.info("The vLLM engine of %s is %s: %s", self._engine.name, stage.value, reason)


def _in_words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).rstrip(".")
