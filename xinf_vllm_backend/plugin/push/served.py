"""A model that has served here: its replicas, which of them a request is sent to, and the wait while there is none."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from ...engine import quarantine
from ...engine.seams.seam import Seam
from ...errors import EngineRestartingError, EngineStoppedError, RequestError, RequestQuarantinedError
from ...process.link import LinkLostError
from .. import cluster_link, replicas
from .links import Links, Peer
from .request import Request

logger = logging.getLogger("xinference.vllm_backend")

ASK = 2.0  # seconds for the supervisor, and for a worker, to say which replicas there are
LOOK = 5.0  # seconds after which they are asked again, while all replicas live
LOOK_AGAIN = 0.25  # seconds, while one does not and a request comes
LOOK_ON = 1.0  # seconds, while one does not and no request comes
GONE = 30.0  # seconds for which nothing is asked at the address of a process that died or said that it ends
AVOIDED = 10.0  # seconds for which others are preferred to a replica whose engine was away for long
AT_ONCE = 16  # requests that are sent again at the same time, until each is admitted
HEAD = 2048  # characters of a prompt by which requests with the same head are told
SHORT = 256  # characters up to which the head of a prompt is of no account
HEADS = 4096  # heads that are remembered
UNEVEN = 1.1  # times the load of the least loaded replica, and this request, that one which has seen the head may have
TRIAL_SHARE = 0.25  # of recovery_timeout for which requests wait for one that is suspected of killing processes

STATUSES = Seam(
    "xinference.core.status_guard",
    "StatusGuardActor.get_replica_statuses",
    "requests that outlive their model process",
    "they fail with it",
)
SEAMS = (STATUSES,)


class Replica:
    """One replica of a model.

    Attributes:
        uid: Xinference's, of the replica.
        ref: of its model actor; None while it has none that lives, as far as is known.
        peer: the link to its process; None where it offers none.
        requests: those that it works on.
        worker: address of its worker; "" as long as it is not known.
        serves: whether Xinference says that it does; its process may have died since.
        gone: address of a process that has died or is ending, and until when it is not asked.
        asking: the task that asks its worker for it; None if none has.
        avoided: ``time.monotonic()`` until which others are preferred: its engine is away.
    """

    def __init__(self, uid: str, ref: Any = None, peer: Peer | None = None) -> None:
        self.uid = uid
        self.worker = ""
        self.serves = False
        self.gone = "", 0.0
        self.ref = ref
        self.peer = peer
        self.requests: dict[Request, None] = {}
        self.asking: asyncio.Task[None] | None = None
        self.avoided = 0.0

    def is_gone(self, ref: Any) -> bool:
        """Whether ``ref`` is that of a process which has died or is ending; the next one has another address."""
        address, until = self.gone
        return bool(ref.address == address and time.monotonic() < until)

    def lives(self) -> bool:
        return self.ref is not None and (self.peer is None or self.peer.current() is not None)

    def is_avoided(self) -> bool:
        return time.monotonic() < self.avoided

    def load(self) -> int:
        """Tokens that are expected of it yet."""
        return sum(request.tokens() for request in self.requests)


class Served:
    """One model.

    Args:
        model_uid: Xinference's.
        links: of this process.
        supervisor: returns Xinference's supervisor.
        events: returns the events of the model, as Xinference's REST API has them.
        failover: what its model process said: ``recovery_timeout`` in seconds, and ``max_deaths`` of a request.

    Attributes:
        paced: held by a request that is sent again, until it is admitted.
        ended: why it serves no more; None as long as it may.
    """

    def __init__(
        self,
        model_uid: str,
        links: Links,
        supervisor: Callable[[], Awaitable[Any]],
        events: Callable[[], Awaitable[list[dict[str, Any]]]],
        failover: dict[str, Any],
    ) -> None:
        self.model_uid = model_uid
        self.recovery_timeout = float(failover["recovery_timeout"])
        self.paced = asyncio.Semaphore(AT_ONCE)
        self.ended: RequestError | None = None
        self._max_deaths = int(failover["max_deaths"])
        self._links = links
        self._supervisor = supervisor
        self._events = events
        self._since = int(time.time())
        self._replicas: dict[str, Replica] = {}
        self._heads: OrderedDict[int, str] = OrderedDict()  # replicas by the hash of what they have seen
        self._trial: Request | None = None  # the one suspected request that is being tried
        self._looked = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._lost_at: float | None = None  # since when no replica lives
        self._missed_at: float | None = None  # since when one does not
        self._timer: asyncio.TimerHandle | None = None  # of the next look meanwhile

    # -- which replica

    async def replica_for(self, request: Request | None = None) -> Replica:
        """The replica that ``request`` is to be sent to; waits while none lives.

        Raises:
            EngineRestartingError: none lived within ``recovery_timeout``.
            RequestError: the model serves no more.
        """
        if request is not None:
            await self._after_trial(request)
        while True:
            await self._look()
            if self.ended is not None:
                raise type(self.ended)(str(self.ended))
            if living := self.living():
                self._lost_at = None
                return self._best(living, request)
            self._lost_at = self._lost_at or time.monotonic()
            if time.monotonic() - self._lost_at > self.recovery_timeout:
                raise self.overdue()
            await asyncio.sleep(LOOK_AGAIN)

    def living(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.lives()]

    def is_overdue(self) -> bool:
        """Whether none of its replicas has lived for longer than requests wait."""
        return self._lost_at is not None and time.monotonic() - self._lost_at > self.recovery_timeout

    def overdue(self) -> EngineRestartingError:
        """What a request is told that has waited for as long as one may."""
        return EngineRestartingError(
            f"No replica of the model {self.model_uid} has served for {self.recovery_timeout:g} s; send the request "
            "again later."
        )

    async def has_room(self, request: Request) -> bool:
        """Whether some replica lives that has not said to ``request`` that it has none; looks for one that is back."""
        if self._is_missing() and all(each.uid in request.full for each in self.living()):
            await asyncio.wait({self._begin_look()})
        return any(each.uid not in request.full for each in self.living())

    def has_other(self, replica: Replica) -> bool:
        return any(each is not replica for each in self.living())

    def has_ready(self, replica: Replica) -> bool:
        """Whether another one lives, and its engine too, as far as is known."""
        return any(each is not replica and not each.is_avoided() for each in self.living())

    def avoid(self, replica: Replica) -> None:
        """Its engine is being restarted, and that takes long."""
        replica.avoided = time.monotonic() + AVOIDED

    def _best(self, living: list[Replica], request: Request | None) -> Replica:
        """The least loaded, or one that has seen the head of the prompt and is hardly more loaded."""
        if request is not None:
            living = [replica for replica in living if replica.uid not in request.full] or living
        living = [replica for replica in living if not replica.is_avoided()] or living
        if len(living) == 1 or request is None:
            return living[0]
        loads = {replica.uid: replica.load() for replica in living}
        best = min(living, key=lambda replica: loads[replica.uid])
        text = request.head(HEAD)
        if len(text) <= SHORT:
            return best
        head = hash(text)
        seen = self._replicas.get(self._heads.pop(head, ""))
        if seen in living and loads[seen.uid] <= UNEVEN * loads[best.uid] + request.tokens():
            best = seen
        self._heads[head] = best.uid
        if len(self._heads) > HEADS:
            self._heads.popitem(last=False)
        return best

    # -- requests that kill

    def lost(self, replica: Replica, ref: Any, silent: bool = False) -> None:
        """The process behind ``ref``, that of ``replica``, has died or is ending; a no-op when that is known.

        Args:
            silent: it has only not answered, and may again.
        """
        if replica.ref is not ref:
            return
        replica.ref = None
        if not silent:
            replica.gone = ref.address, time.monotonic() + GONE
        working, replica.requests = list(replica.requests), {}
        logger.warning("The model process of %s is lost, with %d requests, which go on", replica.uid, len(working))
        stuck = [request.entry for request in working if not request.entry.further.is_set()]
        for request in working:
            request.entry.lost(time.monotonic())
        for entry in quarantine.culprits(stuck, self._max_deaths):
            self._quarantine(next(request for request in working if request.entry is entry))
        self._looked = float("-inf")
        self._begin_look()

    def _quarantine(self, request: Request) -> None:
        message = (
            f"The request {request.id} was refused: model processes of {self.model_uid} died {request.entry.deaths} "
            "times in a row while they worked on it; change the request before you send it again."
        )
        logger.error("%s", message)
        request.refused = RequestQuarantinedError(message)

    async def _after_trial(self, request: Request) -> None:
        """Wait while a request is tried that is suspected of killing model processes, so that a death tells of it."""
        until = time.monotonic() + TRIAL_SHARE * self.recovery_timeout
        while self._trial not in (None, request) and (left := until - time.monotonic()) > 0:
            further = asyncio.ensure_future(self._trial.entry.further.wait())
            await asyncio.wait({further}, timeout=left)
            further.cancel()
            if self._trial is not None and self._trial.entry.further.is_set():
                self._trial = None
        if quarantine.suspects([request.entry], self._max_deaths):
            self._trial = request

    # -- which replicas there are

    def adopt(self, uid: str, ref: Any, peer: Peer) -> Replica:
        """A replica that is known to live."""
        replica = self._replicas.setdefault(uid, Replica(uid))
        replica.ref, replica.peer = ref, peer
        return replica

    def end(self, error: RequestError) -> None:
        """Serve no more: every request that waits, now or later, ends with ``error``."""
        self.ended = error

    def forget(self) -> None:
        """Ask for the replicas before the next request: they may have changed."""
        self._looked = float("-inf")

    async def _look(self) -> None:
        """Ask which replicas there are and live, if that is due; returns at once while one is known to live."""
        due = LOOK if self._replicas and len(self.living()) == len(self._replicas) else LOOK_AGAIN
        if time.monotonic() - self._looked >= due:
            self._begin_look()
        if self._looking is not None and not self.living():
            await asyncio.wait({self._looking})

    def _found(self, looking: asyncio.Future[None]) -> None:
        self._looking = None
        self._looked = time.monotonic()
        if self._is_missing() and self._timer is None:  # so that no request finds a replica missing that is back
            self._timer = asyncio.get_running_loop().call_later(self._pause(), self._look_on)
        if not looking.cancelled() and (error := looking.exception()) is not None:
            logger.warning("The replicas of %s cannot be found: %r", self.model_uid, error)

    def _pause(self) -> float:
        """Seconds until the next look while a replica is missing; more of them when it is missing for long."""
        self._missed_at = self._missed_at or time.monotonic()
        return LOOK_ON if time.monotonic() - self._missed_at < self.recovery_timeout else LOOK

    def _look_on(self) -> None:
        self._timer = None
        if self._is_missing():
            self._begin_look()
        else:
            self._missed_at = None

    def _is_missing(self) -> bool:
        """Whether a replica does not live that may again."""
        return self.ended is None and len(self.living()) < len(self._replicas)

    def _begin_look(self) -> asyncio.Task[None]:
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._find())
            self._looking.add_done_callback(self._found)
        return self._looking

    async def _find(self) -> None:
        try:
            statuses = await asyncio.wait_for(replicas.statuses(self._supervisor, self.model_uid), ASK)
        except Exception as error:  # it may be starting again; what was known is still asked
            logger.debug("The supervisor does not say which replicas of %s there are: %r", self.model_uid, error)
        else:
            await self._keep({s.replica_model_uid: s for s in statuses if s.status != "TERMINATED"})
        asking = [self._ask(replica) for replica in self._replicas.values() if replica.serves]
        if asking:
            await asyncio.wait(asking, timeout=ASK)

    async def _keep(self, statuses: dict[str, Any]) -> None:
        for uid, status in statuses.items():
            replica = self._replicas.setdefault(uid, Replica(uid))
            replica.worker, replica.serves = status.worker_address, status.status in replicas.SERVES
            if not replica.serves:
                replica.ref = None
        self._replicas = {uid: replica for uid, replica in self._replicas.items() if uid in statuses}
        if not statuses and (reason := await self._given_up()) is not None:
            self.end(EngineStoppedError(reason))

    async def _given_up(self) -> str | None:
        """Why the model is not started again any more; None if nobody has said so."""
        events = await asyncio.wait_for(self._events(), ASK)
        of_this_launch = [event for event in events if event.get("event_ts", 0) >= self._since]
        texts = [str(event.get("event_content")) for event in of_this_launch]
        return next((text for text in reversed(texts) if cluster_link.GIVEN_UP in text), None)

    def _ask(self, replica: Replica) -> asyncio.Task[None]:
        if replica.asking is None or replica.asking.done():
            replica.asking = asyncio.ensure_future(self._ask_worker(replica))
        return replica.asking

    async def _ask_worker(self, replica: Replica) -> None:
        """Find out whether ``replica`` lives, and where."""
        import xoscar as xo

        try:
            worker = await asyncio.wait_for(xo.actor_ref(address=replica.worker, uid=replicas.WORKER_UID), ASK)
            ref = await asyncio.wait_for(worker.get_model(model_uid=replica.uid), ASK)
            if replica.is_gone(ref):
                raise LinkLostError("its process is ending")
        except Exception as error:  # it is loading, or its worker is gone
            logger.debug("The replica %s is not there: %r", replica.uid, error)
            if not isinstance(error, asyncio.TimeoutError):  # a worker may be busy
                replica.ref = None
            return
        try:
            replica.ref, replica.peer = ref, await self._links.make(ref)
        except Exception as error:  # its worker has not noticed its end, or it is stopped
            logger.debug("The replica %s offers no link: %r", replica.uid, error)
            if isinstance(error, RuntimeError) and getattr(error, "address", None):  # it said so
                replica.ref, replica.peer = ref, None
