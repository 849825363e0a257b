"""Pause, resume, sleep and wake-up of a model with all its replicas; runs in an API process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ..engine.pause import Order
from ..errors import BadRequestError, ControlError, RequestNotFoundError
from .calls import NoAnswerError, answers, kept
from .outcome import LAUNCHING, Outcome, all_of, gone, launching, told, why
from .replicas import Replica
from .rest_errors import text_of
from .two_phases import TwoPhases

FIND = 5.0  # seconds for Xinference to say which replicas there are, for a worker to give one, and for that to answer
RESUME_TIMEOUT = 300.0  # seconds for each replica to serve again
SETTLE = 600.0  # seconds in which a replica that could not be told to go back is told so when it answers again
AGAIN = 0.5  # seconds until a replica that has no process is looked for again

Find = Callable[[str], Awaitable[Sequence[Replica]]]


class Controls:
    """The orders of one API process.

    Args:
        find: returns the replicas of a model.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self._pausing: set[str] = set()
        self._resuming: dict[str, asyncio.Task[Outcome]] = {}

    async def pause(self, model_uid: str, action: str, given: Mapping[str, Any]) -> Outcome:
        """Pause or put to sleep all replicas, or none; goes on where the caller is cancelled.

        Args:
            model_uid: Xinference's.
            action: "pause" or "sleep".
            given: the arguments of an :class:`.Order`, but for ``action`` and ``epoch``.

        Raises:
            BadRequestError: one of these cannot be used.
            RequestNotFoundError: no such model runs.
            ControlError: Xinference does not say which replicas there are.
        """
        if reserved := {"action", "epoch"} & given.keys():
            raise BadRequestError(f"{reserved.pop()} cannot be given.")
        order = Order.parse({**given, "action": action, "epoch": 1})
        outcome: Outcome = await asyncio.shield(kept(self._pause(model_uid, order)))
        return outcome

    async def resume(self, model_uid: str, timeout: float = RESUME_TIMEOUT) -> Outcome:
        """Have all replicas serve again; safe to repeat, and several at once are one.

        Args:
            model_uid: Xinference's.
            timeout: seconds in which each has to answer; one that is being launched is waited for.

        Raises:
            RequestNotFoundError: no such model runs.
            ControlError: Xinference does not say which replicas there are.
        """
        if (task := self._resuming.get(model_uid)) is None:
            task = self._resuming[model_uid] = kept(self._resume(model_uid, timeout))
            task.add_done_callback(lambda _: self._resuming.pop(model_uid))
        return await asyncio.shield(task)

    async def _pause(self, model_uid: str, order: Order) -> Outcome:
        models, replicas = await self._look(model_uid)
        if model_uid in self._pausing:
            return Outcome(model_uid, False, f"Another pause or sleep of {model_uid} is under way.", replicas)
        if missing := [f"{each['replica']} {each['error']}" for each in replicas if "error" in each]:
            reason = f"The {order.action} of {model_uid} was not begun: {'; '.join(missing)}."
            return Outcome(model_uid, False, reason, replicas)
        epoch = 1 + max(each["epoch"] for each in replicas)
        pausing = TwoPhases(model_uid, order.model_copy(update={"epoch": epoch}), models)
        self._pausing.add(model_uid)
        try:
            outcome = await pausing.run()
        finally:
            self._pausing.discard(model_uid)
        for uid in pausing.unsettled:
            until = time.monotonic() + SETTLE
            kept(self._until_answered(model_uid, uid, until, "roll_back_pause", epoch, outcome.reason))
        return outcome

    async def _resume(self, model_uid: str, timeout: float) -> Outcome:
        until = time.monotonic() + timeout
        uids = [replica.uid for replica in await self._replicas(model_uid)]
        resuming = (self._until_answered(model_uid, uid, until, "resume_engine") for uid in uids)
        replicas = await asyncio.gather(*resuming)
        failed = [each for each in replicas if "error" in each or each["control"] != "serving"]
        if not failed:
            return Outcome(model_uid, True, f"{all_of(model_uid, replicas)} serving.", replicas)
        named = "; ".join(f"{each['replica']} {each.get('error', 'is ' + each['control'])}" for each in failed)
        reason = f"Not all replicas of {model_uid} serve: {named}. It is safe to resume again."
        return Outcome(model_uid, False, reason, replicas)

    # -- the replicas

    async def _replicas(self, model_uid: str) -> Sequence[Replica]:
        found = (await answers({model_uid: self._find(model_uid)}, FIND))[model_uid]
        if isinstance(found, Exception):
            raise ControlError(f"Xinference does not say which replicas of {model_uid} there are: {text_of(found)}.")
        if not found:
            raise RequestNotFoundError(f"No model {model_uid} is running.")
        replicas: Sequence[Replica] = found
        return replicas

    async def _look(self, model_uid: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The actors of those replicas that have one, and what each replica tells."""
        replicas = await self._replicas(model_uid)
        found = await answers({each.uid: each.model() for each in replicas if each.serves}, FIND)
        models = {uid: model for uid, model in found.items() if not isinstance(model, Exception)}
        status = await answers({uid: model.control_status() for uid, model in models.items()}, FIND)
        return models, [
            told(each.uid, status[each.uid]) if each.uid in models else launching(each) for each in replicas
        ]

    async def _until_answered(self, model_uid: str, uid: str, until: float, method: str, *given: Any) -> dict[str, Any]:
        """What the replica ``uid`` answers, as soon as it has a process."""
        while True:
            answer = await self._answered(model_uid, uid, until, method, *given)
            if answer["control"] != LAUNCHING or time.monotonic() >= until:
                return answer
            await asyncio.sleep(AGAIN)

    async def _answered(self, model_uid: str, uid: str, until: float, method: str, *given: Any) -> dict[str, Any]:
        try:
            replica = next((each for each in await self._replicas(model_uid) if each.uid == uid), None)
        except RequestNotFoundError:
            replica = None
        except ControlError as error:  # the supervisor may be starting again
            return {"replica": uid, "control": LAUNCHING, "error": str(error).rstrip(".")}
        if replica is None:
            return gone(uid)
        model = (await answers({uid: replica.model()}, FIND))[uid]
        if isinstance(model, Exception):
            return launching(replica)
        answer = (await answers({uid: getattr(model, method)(*given)}, until - time.monotonic()))[uid]
        if not isinstance(answer, Exception) or isinstance(answer, NoAnswerError):
            return told(uid, answer)
        status = (await answers({uid: model.control_status()}, FIND))[uid]
        return {**told(uid, status), "error": why(uid, answer)}
