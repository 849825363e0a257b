"""What came of a pause, resume, sleep or wake-up of a model, as its caller is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .calls import NoAnswerError
from .push.lost import is_process_lost
from .replicas import Replica
from .rest_errors import text_of

MOVING = ("preparing", "committing", "resuming")  # of a replica with which an order is under way
# Of a replica that has no process, of one that is deleted, and of one that does not answer.
LAUNCHING, GONE, UNKNOWN = "launching", "gone", "unknown"


@dataclass(frozen=True)
class Outcome:
    """What came of an order.

    Attributes:
        model_uid: Xinference's.
        done: whether all is as asked.
        reason: a sentence.
        replicas: of each the ``replica``, its ``control`` and what else it told; ``error`` where it failed.
    """

    model_uid: str
    done: bool
    reason: str
    replicas: Sequence[dict[str, Any]]

    @property
    def state(self) -> str:
        """What all replicas are: "serving", "paused" or "asleep", or where that is not so yet one of ``MOVING``;
        "launching" where none has a process; "mixed" where they differ, or one does not answer.
        """
        found = {replica["control"] for replica in self.replicas}
        settled = found - {LAUNCHING, GONE}
        if not settled or UNKNOWN in found:
            return "mixed" if UNKNOWN in found else LAUNCHING
        moving = [each for each in MOVING if each in found]
        return moving[0] if moving else settled.pop() if len(settled) == 1 else "mixed"

    def as_dict(self) -> dict[str, Any]:
        return {
            "model_uid": self.model_uid,
            "state": self.state,
            "epoch": max((replica.get("epoch", 0) for replica in self.replicas), default=0),
            "replicas": list(self.replicas),
            "reason": self.reason,
        }


def told(uid: str, answer: Any) -> dict[str, Any]:
    """The entry of the replica ``uid``: its status, or what its answer to the question for that says."""
    if not isinstance(answer, Exception):
        return {"replica": uid, **answer}
    no_answer = UNKNOWN if isinstance(answer, NoAnswerError) else "serving"  # of an engine that cannot be paused
    return {"replica": uid, "control": LAUNCHING if is_process_lost(answer) else no_answer, "error": why(uid, answer)}


def launching(replica: Replica) -> dict[str, Any]:
    """The entry of a replica that has no process."""
    error = f"is being launched ({replica.status.lower()}, Xinference says); try again when it is ready"
    return {"replica": replica.uid, "control": LAUNCHING, "error": error}


def gone(uid: str) -> dict[str, Any]:
    """The entry of a replica that was deleted."""
    return {"replica": uid, "control": GONE, "error": "is not there any more"}


def why(uid: str, error: Exception) -> str:
    """Why the replica ``uid`` did not do as it was told, in words that stand behind its name."""
    if is_process_lost(error):
        return "has lost its process, and is launched again"
    if isinstance(error, AttributeError):
        return "is of an engine that this package does not run"
    return text_of(error).rstrip(".").removeprefix(f"{uid} ")


def all_of(model_uid: str, replicas: Sequence[Any]) -> str:
    return f"{model_uid} is" if len(replicas) == 1 else f"All {len(replicas)} replicas of {model_uid} are"
