"""The replicas of a model, as an API process finds them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

WORKER_UID, STATUSES_UID = "worker", "status_guard"  # of Xinference's WorkerActor and StatusGuardActor
SERVES = ("READY", "UPDATING")  # states of a replica in which it does


@dataclass(frozen=True)
class Replica:
    """One replica, as Xinference knows it.

    Attributes:
        uid: Xinference's, of the replica.
        worker: address of its worker.
        status: Xinference's, such as "READY"; its process may have died since.
    """

    uid: str
    worker: str
    status: str

    @property
    def serves(self) -> bool:
        return self.status in SERVES

    async def model(self) -> Any:
        """Its model actor; raises what its worker says while there is none."""
        import xoscar as xo

        worker = await xo.actor_ref(address=self.worker, uid=WORKER_UID)
        return await worker.get_model(model_uid=self.uid)


async def find(get_supervisor: Callable[[], Awaitable[Any]], model_uid: str) -> list[Replica]:
    """Those of ``model_uid`` that are not terminated, in Xinference's order."""
    found = await statuses(get_supervisor, model_uid)
    return [Replica(s.replica_model_uid, s.worker_address, s.status) for s in found if s.status != "TERMINATED"]


async def statuses(get_supervisor: Callable[[], Awaitable[Any]], model_uid: str) -> list[Any]:
    """The ``ReplicaStatus`` of each; the supervisor itself would ask all workers for more, which one may hold up."""
    import xoscar as xo

    guard = await xo.actor_ref(address=(await get_supervisor()).address, uid=STATUSES_UID)
    found: list[Any] = await guard.get_replica_statuses(model_uid)
    return found
