"""One pause of all replicas of a model, in two phases and a confirmation.

Each replica prepares: it lets no request in, and goes on with those it has. When all have, each commits, and when all
have done that, each is told so. When one fails or does not answer, all go back. A replica that is not told in time goes
back by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..engine.pause import Order
from .calls import NoAnswerError, answers
from .outcome import UNKNOWN, Outcome, all_of, told, why

PREPARE, PREPARE_SHARE = 10.0, 0.25  # seconds, and share of the time-out, at most, for each to close its gate
CONFIRM, CONFIRM_SHARE = 2.0, 0.05  # seconds, and share of the time-out, at most, that are kept for the confirmation
ROLL_BACK = 5.0  # seconds for each to go back
ASK = 5.0  # seconds for each to say how it is then
DONE = {"pause": "paused", "sleep": "asleep"}


class TwoPhases:
    """One pause of all replicas of a model.

    Args:
        model_uid: Xinference's.
        order: what each is told.
        models: the actor of each replica, by its uid.

    Attributes:
        unsettled: uids of replicas that may be paused, and could not be told to go back.
    """

    def __init__(self, model_uid: str, order: Order, models: Mapping[str, Any]) -> None:
        self._model_uid = model_uid
        self._order = order
        self._models = models
        self._until = time.monotonic() + order.timeout
        self.unsettled: list[str] = []

    async def run(self) -> Outcome:
        """Have all replicas pause, or none."""
        steps: tuple[tuple[str, Any], ...] = (
            ("prepare_pause", self._order.as_dict()),
            ("commit_pause", self._order.epoch),
            ("confirm_pause", self._order.epoch),
        )
        found: dict[str, Any] = {}
        for method, argument in steps:
            calls = {uid: getattr(model, method)(argument) for uid, model in self._models.items()}
            found = await answers(calls, self._bound(method), until_failure=True)
            if failures := {uid: each for uid, each in found.items() if isinstance(each, Exception)}:
                return await self._taken_back(method, failures)
        replicas = [told(uid, answer) for uid, answer in found.items()]
        reason = f"{all_of(self._model_uid, replicas)} {DONE[self._order.action]}."
        return Outcome(self._model_uid, True, reason, replicas)

    def _bound(self, method: str) -> float:
        """Seconds for all replicas to answer ``method``."""
        left, timeout = self._until - time.monotonic(), self._order.timeout
        if method == "prepare_pause":
            return min(PREPARE, PREPARE_SHARE * timeout)
        return left - min(CONFIRM, CONFIRM_SHARE * timeout) if method == "commit_pause" else left

    async def _taken_back(self, method: str, failures: Mapping[str, Exception]) -> Outcome:
        """Have all replicas go back that may have something to undo."""
        named = "; ".join(f"{uid} {why(uid, error)}" for uid, error in failures.items())
        reason = f"the {self._order.action} of {self._model_uid} was taken back: {named}"
        refused = {uid for uid, error in failures.items() if not isinstance(error, NoAnswerError)}
        undone = self._models.keys() - (refused if method == "prepare_pause" else set())
        calls = {uid: self._models[uid].roll_back_pause(self._order.epoch, reason) for uid in undone}
        back = await answers(calls, ROLL_BACK)
        if method == "confirm_pause":  # it may have been told that all have committed
            self.unsettled = [uid for uid, answer in back.items() if isinstance(answer, Exception)]
        now = await answers({uid: model.control_status() for uid, model in self._models.items()}, ASK)
        return self._outcome(reason, [told(uid, answer) for uid, answer in now.items()])

    def _outcome(self, reason: str, replicas: list[dict[str, Any]]) -> Outcome:
        outcome = Outcome(self._model_uid, False, "", replicas)
        now = f"{self._model_uid} is {outcome.state} now"
        if silent := [str(each["replica"]) for each in replicas if each["control"] == UNKNOWN]:
            left = max(0.0, self._until - time.monotonic())
            now = (
                f"nobody knows what {', '.join(silent)} does: it goes back when it answers again, and by itself within "
                f"{left:.0f} s if it runs"
            )
        return Outcome(self._model_uid, False, f"{reason[0].upper()}{reason[1:]}; {now}.", replicas)
