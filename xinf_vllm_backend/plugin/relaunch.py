"""The worker launches a model whose process died again: after growing delays, and within a budget.

Xinference does so at once and without end, and gives a replica up when one launch fails. Its task that finds deaths
waits meanwhile; here each replica has a task of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from ..engine.recovery import RestartBudget
from ..engine.seams.seam import Seam
from ..settings import Settings
from . import across, model_watch, replica_log, xavier
from .cluster_link import GIVEN_UP, WorkerLink
from .launched import CannotLaunchAgainError, is_driver, is_of_ours, spans_workers

logger = logging.getLogger("xinference.vllm_backend")

RECOVER = Seam(
    "xinference.core.worker",
    "WorkerActor.recover_model",
    "launching models whose processes died again within a budget",
    "it is done at once and without end, and a replica is given up when one launch fails",
)
TERMINATE = Seam(RECOVER.module, "WorkerActor.terminate_model", RECOVER.used_for, RECOVER.without)
EVICT = Seam(RECOVER.module, "WorkerActor._evict_replica_from_supervisor", RECOVER.used_for, RECOVER.without)
CANCEL = Seam(RECOVER.module, "WorkerActor.cancel_launch_model", RECOVER.used_for, RECOVER.without)
MODELS = Seam(
    RECOVER.module,
    "WorkerActor",
    RECOVER.used_for,
    RECOVER.without,
    members=("_model_uid_to_launch_args", "_model_uid_to_model", "_model_uid_to_recover_count"),
)
SPAWN = Seam("xinference.core.lifecycle", "spawn_management_task", RECOVER.used_for, RECOVER.without)
SEAMS = (RECOVER, TERMINATE, EVICT, CANCEL, MODELS, SPAWN)

LAUNCH_MARGIN = 600.0  # seconds beyond load_timeout that a launch may take, for all that precedes the load
END_TIMEOUT = 60.0  # seconds that a launch which took too long, or a deletion, has to end
ASK_AGAIN = 1.0  # seconds between two cancellations of one launch
ENDED = "its model process ended"
LIMIT_REACHED = "the limit XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT is reached"

Attempt = Callable[[], Coroutine[Any, Any, None]]


class LaunchCancelledError(Exception):
    """A user has cancelled the launch."""


def install() -> None:
    """Have this process, if it is a worker's, launch dead models of ours again within a budget; idempotent."""
    if RECOVER.module not in sys.modules or not all(seam.present() for seam in SEAMS):
        return
    relaunches = Relaunches()
    RECOVER.wrap(relaunches.recovering)
    TERMINATE.wrap(relaunches.terminating)
    EVICT.wrap(relaunches.evicting)


class Replica:
    """A replica of which a model process died.

    Args:
        settings: of its model.

    Attributes:
        budget: of launches.
        died: whether its model process has died since the last launch began.
        deleted: set when the model was deleted.
        is_decided: not set while it is being deleted, which may fail.
        task: what launches it again.
        launching: the launch that is under way, or the last one.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # With max_restarts=0 each death of an engine ends the model process, which then has to be launched again.
        self.budget = RestartBudget(max(1, settings.max_restarts), settings.restart_refill)
        self.died = False
        self.deleted = asyncio.Event()
        self.is_decided = asyncio.Event()
        self.is_decided.set()
        self.task: asyncio.Task[None] | None = None
        self.launching: asyncio.Task[None] | None = None

    async def is_deleted_within(self, delay: float) -> bool:
        """Wait ``delay`` seconds, and longer for a deletion that is under way; whether it is deleted."""
        if not await _is_set_within(self.deleted, delay):
            await _is_set_within(self.is_decided, END_TIMEOUT)
        return self.deleted.is_set()

    @contextlib.contextmanager
    def deleting(self) -> Iterator[None]:
        """Delete it here: it is deleted unless that raises."""
        self.is_decided.clear()
        try:
            yield
            self.deleted.set()
        finally:
            self.is_decided.set()


class Relaunches:
    """Those replicas of a worker of which a model process died."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        # Replicas that Xinference clears away after a death; it then launches them again or gives them up.
        self._dying: set[str] = set()
        self._deleting: set[str] = set()
        self._clearing: set[str] = set()  # what is left of them is ended before they are launched again

    # -- in place of Xinference's methods

    def recovering(self, original: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(original)
        async def recover_model(worker: Any, launch_args: dict[str, Any]) -> None:
            if not is_of_ours(**launch_args):
                await original(worker, launch_args)
                return
            uid = launch_args["model_uid"]
            if uid in self._dying:  # else it was deleted meanwhile
                self._dying.discard(uid)
                if not spans_workers(**launch_args):
                    attempt = functools.partial(_launch_replica, original, worker, launch_args)
                    self.begin(worker, uid, attempt, functools.partial(_leave, worker, launch_args))
                elif is_driver(**launch_args):
                    self.begin(worker, uid, functools.partial(self._launch_across, worker, launch_args))

        return recover_model

    def terminating(self, original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(original)
        async def terminate_model(worker: Any, model_uid: str, is_model_die: bool = False) -> None:
            launch_args = worker._model_uid_to_launch_args.get(model_uid, {})
            is_ours = is_of_ours(**launch_args)
            if is_model_die:
                if is_ours and model_uid not in self._deleting:
                    self._dying.add(model_uid)
                model_watch.watches.end(model_uid)
                await original(worker, model_uid, is_model_die=True)
                return
            if model_uid in self._clearing:
                await original(worker, model_uid)
                return
            is_ours = is_ours or model_uid in self._replicas
            await self._delete(worker, model_uid, functools.partial(original, worker, model_uid))
            if is_ours and is_driver(**launch_args):
                replica_log.forget(model_uid)  # its process may have ended before it did so itself

        return terminate_model

    def evicting(self, original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(original)
        async def evict(worker: Any, model_uid: str) -> None:
            if model_uid in self._dying:
                await self._tell_end(worker, model_uid, f"{ENDED} and {LIMIT_REACHED}")
            await original(worker, model_uid)

        return evict

    async def _delete(self, worker: Any, uid: str, delete: Callable[[], Awaitable[None]]) -> None:
        replica = self._replicas.get(uid)
        self._dying.discard(uid)
        self._deleting.add(uid)
        try:
            if replica is None:
                await delete()
            else:
                with replica.deleting():
                    if replica.launching is not None:  # Xinference refuses to delete what is being launched
                        await _end(worker, uid, replica.launching)
                    await delete()
        finally:
            self._deleting.discard(uid)
        self._forget(uid)

    async def _launch_across(self, worker: Any, launch_args: dict[str, Any]) -> None:
        uid = launch_args["model_uid"]
        self._clearing.add(uid)
        try:
            await across.clear(worker, uid)
        finally:
            self._clearing.discard(uid)
        await across.launch_again(worker, launch_args)

    def _forget(self, uid: str) -> None:
        self._replicas.pop(uid, None)
        self._dying.discard(uid)
        model_watch.watches.forget(uid)

    # -- one replica

    def begin(self, worker: Any, uid: str, attempt: Attempt, leave: Attempt | None = None) -> None:
        """Launch a replica again, in a task of its own; one that is being launched is launched once more.

        Args:
            worker: Xinference's.
            uid: of the replica.
            attempt: one launch.
            leave: called after each death, before the launch is put off.
        """
        replica = self._replicas.get(uid)
        if replica is None:
            replica = self._replicas[uid] = Replica(model_watch.watches.settings(uid))
        replica.died = True
        if replica.task is None or replica.task.done():
            replica.task = _spawned(worker, self._relaunch(worker, uid, replica, attempt, leave))

    async def _relaunch(self, worker: Any, uid: str, replica: Replica, attempt: Attempt, leave: Attempt | None) -> None:
        limit = XinferencesLimit(worker, uid)
        why = ENDED
        while replica.died:
            if leave is not None:
                await leave()
            delay = replica.budget.take() if limit.allows() else None
            if delay is None:
                await self._give_up(worker, uid, f"{why} and {limit.reached() or _spent(replica.settings)}")
                return
            logger.warning("The model %s is launched again in %.1f s: %s", uid, delay, why)
            if await replica.is_deleted_within(delay):
                return
            try:
                why = await self._launched(worker, uid, replica, attempt)
            except LaunchCancelledError:
                if not await replica.is_deleted_within(0):
                    await self._give_up(worker, uid, "its launch was cancelled")
                return
            except CannotLaunchAgainError as reason:
                await self._give_up(worker, uid, f"{ENDED}, and {reason}")
                return
            if replica.deleted.is_set():
                return
        replica.budget.healthy()

    async def _launched(self, worker: Any, uid: str, replica: Replica, attempt: Attempt) -> str:
        """Launch it once; ``died`` says whether it has to be launched again, and the result why."""
        replica.died = False
        try:
            await self._clear(worker, uid)
            replica.launching = _spawned(worker, attempt())
            await _until_launched(worker, uid, replica.launching, replica.settings.load_timeout + LAUNCH_MARGIN)
        except (LaunchCancelledError, CannotLaunchAgainError):
            raise
        except Exception:
            replica.died = True
            logger.exception("The model %s could not be launched again", uid)
            return "it could not be launched again"
        return ENDED

    async def _clear(self, worker: Any, uid: str) -> None:
        """End what a launch has left that failed behind its load; Xinference refuses to launch beside it."""
        if uid in worker._model_uid_to_model:
            await worker.terminate_model(uid, is_model_die=True)
            self._dying.discard(uid)

    async def _give_up(self, worker: Any, uid: str, why: str) -> None:
        await self._tell_end(worker, uid, why)
        await worker._evict_replica_from_supervisor(uid)

    async def _tell_end(self, worker: Any, uid: str, why: str) -> None:
        text = f"The model {uid} {GIVEN_UP}{why}; find the cause in the worker's log, then launch the model again."
        logger.error("%s", text)
        self._forget(uid)
        worker._model_uid_to_recover_count.pop(uid, None)  # it is of the next launch
        replica_log.forget(uid)
        await WorkerLink(worker, uid).announce(text, error=True)


async def _launch_replica(
    launch: Callable[..., Coroutine[Any, Any, None]], worker: Any, launch_args: dict[str, Any]
) -> None:
    if (config := launch_args.get("xavier_config")) is not None:
        await xavier.check_rank0(config)
    await launch(worker, launch_args)


async def _leave(worker: Any, launch_args: dict[str, Any]) -> None:
    if (config := launch_args.get("xavier_config")) is not None:
        await xavier.leave(worker, launch_args["model_uid"], config)


class XinferencesLimit:
    """Xinference's own limit of launches of a replica, where one is set.

    Xinference has counted the first launch of a recovery, and forgets the count when a launch fails.

    Args:
        worker: Xinference's.
        uid: of the replica.
    """

    def __init__(self, worker: Any, uid: str) -> None:
        self._counts: dict[str, int | None] = worker._model_uid_to_recover_count
        self._uid = uid
        self._left: int | None = self._counts.get(uid)
        self._is_first = True

    def allows(self) -> bool:
        """Count one launch; whether it is allowed."""
        if self._left is None or self._is_first:
            self._is_first = False
            return True
        self._left -= 1
        self._counts[self._uid] = max(0, self._left)
        return self._left >= 0

    def reached(self) -> str:
        """That the last launch was not allowed, in words; empty if it was."""
        return LIMIT_REACHED if self._left is not None and self._left < 0 else ""


async def _until_launched(worker: Any, uid: str, launching: asyncio.Task[None] | None, timeout: float) -> None:
    """Wait for the end of one launch.

    Raises:
        LaunchCancelledError: a user cancelled it.
        TimeoutError: it took longer than ``timeout`` seconds, and was ended.
    """
    if launching is None:
        raise asyncio.CancelledError("the worker is being stopped")
    await asyncio.wait({launching}, timeout=timeout)
    if not launching.done():
        await _end(worker, uid, launching)
        raise TimeoutError(f"the launch took longer than {timeout:g} s")
    if launching.cancelled():
        raise LaunchCancelledError(f"the launch of {uid} was cancelled")
    launching.result()


async def _end(worker: Any, uid: str, launching: asyncio.Task[None]) -> None:
    """End a launch: with its process, since a call of one that hangs cannot be cancelled."""
    deadline = time.monotonic() + END_TIMEOUT
    while not launching.done() and time.monotonic() < deadline:
        # Refused while Xinference does not know of the launch yet, and when it is done with it.
        with contextlib.suppress(RuntimeError, TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(worker.cancel_launch_model(uid), END_TIMEOUT)
        await asyncio.wait({launching}, timeout=ASK_AGAIN)
    launching.cancel()
    launching.add_done_callback(lambda task: task.cancelled() or task.exception())


def _spawned(worker: Any, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """A task for which Xinference waits when the worker is replaced, and which ends with it; None if it is too late."""
    task: asyncio.Task[None] | None = SPAWN.owner().spawn_management_task(worker, coroutine)
    return task


async def _is_set_within(event: asyncio.Event, timeout: float) -> bool:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), timeout)
    return event.is_set()


def _spent(settings: Settings) -> str:
    number, refill = max(1, settings.max_restarts), settings.restart_refill
    return f"its budget of launches is spent (max_restarts: {number}, restart_refill: {refill:g} s)"
