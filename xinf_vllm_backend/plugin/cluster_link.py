"""Tells the rest of the cluster about a model process: progress, events, the last error, counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any

from ..engine.phase import Phase

# Under "xinference", or Xinference's own handlers drop it.
logger = logging.getLogger("xinference.vllm_backend")

GIVEN_UP = "was given up: "  # in the event of a replica that is launched no more: the API looks for it
TELL_TIMEOUT = 2.0  # seconds; a message may not hold up a load or a recovery
DEATHS, RESTARTS, INEXACT = "xinf_vllm_engine_deaths", "xinf_vllm_engine_restarts", "xinf_vllm_requests_inexact"
SLEEPS, WAKINGS = "xinf_vllm_engine_sleeps", "xinf_vllm_engine_wakings"
# By name, what each counts; the exporter shows NAME as xinference:NAME_total, without the "xinf_".
METRICS = {
    DEATHS: "vLLM engines that died or hung while they served.",
    RESTARTS: "vLLM engines that came back in place.",
    INEXACT: "Requests that went on after the death of their engine, but not exactly as they would have.",
    SLEEPS: "vLLM engines that went to sleep, by themselves or by an order; none of them died.",
    WAKINGS: "vLLM engines that were woken.",
}
# Xinference's own stages end at 0.82; the phases share the rest. Where each one begins:
PHASE_PROGRESS = {
    Phase.ENVIRONMENT: 0.82,
    Phase.CONFIGURATION: 0.84,
    Phase.PROCESSES: 0.88,
    Phase.WEIGHTS: 0.92,
    Phase.PROFILING: 0.95,
    Phase.WARM_UP: 0.97,
    Phase.READY: 1.0,
}


class ClusterLink:
    """Sends messages from one model process to its worker and supervisor.

    Args:
        address: address of the model's own actor pool.
        replica_uid: uid of the model's own actor.
    """

    def __init__(self, address: str, replica_uid: str) -> None:
        from xinference.core.utils import parse_replica_model_uid

        self._address = address
        self._replica_uid = replica_uid
        self._in_order = asyncio.Lock()
        self._model_uid, self._replica = parse_replica_model_uid(replica_uid)

    async def show_phase(self, phase: Phase) -> None:
        """Show ``phase`` in the launch progress of the CLI, the UI and the REST API."""
        from xinference.core.progress_tracker import ProgressTrackerActor

        details = {"stage": "loading", "phase": phase.value, "updated_at": time.time()}
        progress = (f"launching-{self._replica_uid}", PHASE_PROGRESS[phase], phase.value, details)
        async with self._in_order:
            await self._tell("progress", self._supervised(ProgressTrackerActor, "set_progress", *progress))

    async def show_place(self) -> None:
        """Note which worker has this replica; Xinference does so of models on one worker alone."""
        await self._tell("place", self._note_place())

    async def _note_place(self) -> None:
        await self._note({"replica_model_uid": self._replica_uid, "worker_address": (await self._worker_ref()).address})

    async def show_failure(self, text: str) -> None:
        """Show why the launch failed; Xinference does so of models on one worker alone."""
        await asyncio.gather(
            self._tell("failure", self._note({"error_message": text})), self.announce(text, error=True)
        )

    async def _note(self, fields: dict[str, Any]) -> None:
        from xinference.core.status_guard import StatusGuardActor

        replica = max(0, self._replica)
        await self._supervised(StatusGuardActor, "update_replica_status", self._model_uid, replica, fields)

    async def announce(self, text: str, *, error: bool = False) -> None:
        """Add ``text`` to the model's events (``GET /v1/models/{uid}/events``)."""
        from xinference.core.event import Event, EventCollectorActor, EventType

        kind = EventType.ERROR if error else EventType.INFO
        event = Event(event_type=kind, event_ts=int(time.time()), event_content=text)
        await self._tell("event", self._supervised(EventCollectorActor, "report_event", self._model_uid, event))

    async def announce_death(self, reason: str, *, count: bool) -> None:
        """Tell the cluster why this process is about to end; waits at most 2 s.

        Args:
            reason: a sentence.
            count: whether the death is to be counted; False for one that was.
        """
        # Xinference shows its last error to the clients whose requests broke off: so it holds no cause.
        last_error = (
            f"The vLLM engine of {self._replica_uid} died, and the model is being started again; send the request "
            "again later."
        )
        await asyncio.gather(
            self.announce(reason, error=True),
            self._tell("last error", self._worker("update_model_status", self._replica_uid, last_error=last_error)),
            *([self.count(DEATHS)] if count else []),
        )

    async def count(self, metric: str) -> None:
        """Count one more of ``metric``, one of ``METRICS``."""
        labels = {"model_uid": self._model_uid, "replica_index": str(self._replica)}
        await self._tell("count", self._worker("record_metrics", metric, "inc", {"labels": labels}))

    async def _tell(self, what: str, telling: Awaitable[Any]) -> None:
        try:
            await asyncio.wait_for(telling, TELL_TIMEOUT)
        except Exception as error:
            logger.warning("The %s of %s did not reach the cluster: %r", what, self._replica_uid, error)

    async def supervisor(self) -> Any:
        """Xinference's supervisor."""
        return await (await self._worker_ref()).get_supervisor_ref(add_worker=False)

    async def _worker_ref(self) -> Any:
        import xoscar as xo
        from xinference.core.worker import WorkerActor

        model = await xo.actor_ref(address=self._address, uid=self._replica_uid)
        if getattr(model, "get_worker_binding", None) is None:  # it came with Xinference 4.1
            return await model._get_worker_ref()  # callable here, in the process of the actor
        binding = await model.get_worker_binding()
        return await xo.actor_ref(address=binding["address"], uid=WorkerActor.default_uid())

    async def _worker(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await getattr(await self._worker_ref(), method)(*args, **kwargs)

    async def _supervised(self, actor: Any, method: str, *args: Any) -> Any:
        import xoscar as xo

        supervisor = await self.supervisor()
        return await getattr(await xo.actor_ref(address=supervisor.address, uid=actor.default_uid()), method)(*args)


class WorkerLink(ClusterLink):
    """Sends messages about one replica from its worker.

    Args:
        worker: the worker itself.
        replica_uid: uid of the model's own actor.
    """

    def __init__(self, worker: Any, replica_uid: str) -> None:
        super().__init__(worker.address, replica_uid)
        self._the_worker = worker

    async def _worker_ref(self) -> Any:
        return self._the_worker
