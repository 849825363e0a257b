"""The API process: requests to models of ours go by links, and outlive their model process.

Xinference's API gets its supervisor from one method. What that returns is wrapped, and so are the models that the
supervisor returns: a chat or generate of ours names a link, and is read from it. An embedding or rerank names one, too,
which tells of the end of the process; its answer comes by the call itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ...engine.seams.seam import Seam
from ...errors import EngineStoppedError, RequestError
from ...process.link import LinkLostError
from .. import push
from ..refusals import refusals
from ..rest_errors import RETRY_AFTER, UNAVAILABLE
from . import NotBegunError
from .links import ASK, Links
from .request import Request
from .served import SEAMS as OUTLIVING
from .served import Replica, Served
from .stream import Stream

logger = logging.getLogger("xinference.vllm_backend")

GET_SUPERVISOR = Seam(
    "xinference.api.restful_api",
    "RESTfulAPI._get_supervisor_ref",
    "pushing streams to the API",
    "the API pulls each item by an actor call",
)
# By which the model process is asked for a link.
METHODS = Seam("xinference.core.model", "ModelActor.__getattr__", GET_SUPERVISOR.used_for, GET_SUPERVISOR.without)
SEAMS = (GET_SUPERVISOR, METHODS)
EVENTS = Seam(
    "xinference.api.restful_api",
    "RESTfulAPI._get_event_collector_ref",
    "telling waiting requests that their model is not started again",
    "they wait for all of recovery_timeout",
)

KNOWN = 1.0  # seconds that an answer of the supervisor is kept
# Calls of the supervisor that change nothing of what is kept begin with one of these.
_ASKING = ("get_", "list_", "describe_", "is_", "resolve_", "report_", "query_")


def install(api: Any) -> None:
    """Have ``api``, Xinference's, read the streams of our models from links."""
    reason = why_pulled()
    if reason is not None:
        logger.warning("Streams are pulled item by item, not pushed: %s", reason)
        return
    original = api._get_supervisor_ref
    models, answers = Models(original, functools.partial(_events, api)), Answers()

    @functools.wraps(original)
    async def get_supervisor_ref() -> Any:
        return Supervisor(await original(), models, answers)

    api._get_supervisor_ref = get_supervisor_ref


async def _events(api: Any, model_uid: str) -> list[dict[str, Any]]:
    if not EVENTS.present():
        return []
    found: list[dict[str, Any]] = await (await api._get_event_collector_ref()).get_model_events(model_uid)
    return found


def why_pulled() -> str | None:
    """Why an API process of this host would read no stream from a link; None if it would."""
    return push.why_pulled(SEAMS)


def why_not_failed_over() -> str | None:
    """Why no request of an API process of this host outlives its model process; None if those by links do."""
    return push.why_not_failed_over(OUTLIVING)


class Answers:
    """What the supervisor answered, kept for a moment; the last answers are kept for when it cannot answer."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[float, Any]] = {}
        self._last: dict[tuple[str, str], Any] = {}

    def clear(self) -> None:
        self._kept.clear()

    def forget(self, model_uid: str) -> None:
        """Keep nothing of a model that is no more."""
        self._last = {asked: answer for asked, answer in self._last.items() if asked[1] != model_uid}

    def get(self, method: str, model_uid: str) -> Any:
        """None if it is not kept."""
        until, answer = self._kept.get((method, model_uid), (0.0, None))
        return answer if time.monotonic() < until else None

    def last(self, method: str, model_uid: str) -> Any:
        """None if there was none."""
        return self._last.get((method, model_uid))

    def keep(self, method: str, model_uid: str, answer: Any) -> None:
        now = time.monotonic()
        self._kept = {asked: kept for asked, kept in self._kept.items() if now < kept[0]}
        self._kept[method, model_uid] = now + KNOWN, answer
        self._last[method, model_uid] = answer


class Models:
    """The models that have served here.

    Args:
        supervisor: returns Xinference's supervisor.
        events: returns the events of a model.
    """

    def __init__(
        self, supervisor: Callable[[], Awaitable[Any]], events: Callable[[str], Awaitable[list[dict[str, Any]]]]
    ) -> None:
        self.links = Links()
        self._supervisor = supervisor
        self._events = events
        self._served: dict[str, Served] = {}

    def get(self, model_uid: str) -> Served | None:
        """None for one that has not served, or is no more."""
        served = self._served.get(model_uid)
        if served is not None and served.ended is not None:
            del self._served[model_uid]
            return None
        return served

    def end(self, model_uid: str) -> None:
        """It is terminated: no request waits for it."""
        if (served := self._served.pop(model_uid, None)) is not None:
            served.end(EngineStoppedError(f"The model {model_uid} was stopped while the request ran; send it again."))

    def forget(self, model_uid: str) -> None:
        """It is not there, and nobody knows whether it will be."""
        if (served := self._served.pop(model_uid, None)) is not None:
            served.end(served.overdue())

    def changed(self) -> None:
        """Replicas may have come or gone."""
        for served in self._served.values():
            served.forget()

    async def linked(self, model_uid: str, ref: Any) -> tuple[Replica, Served | None] | None:
        """The replica ``ref``, and its model if requests outlive its process; None if there is no link."""
        peer = await self.links.linked(ref)
        if peer is None or peer.current() is None:
            return None
        uid = ref.uid.decode()
        if peer.failover is None or why_not_failed_over() is not None:
            return Replica(uid, ref, peer), None
        served = self.get(model_uid)
        if served is None:
            events = functools.partial(self._events, model_uid)
            served = self._served[model_uid] = Served(model_uid, self.links, self._supervisor, events, peer.failover)
        return served.adopt(uid, ref, peer), served


class Supervisor:
    """The reference of Xinference's supervisor, whose models push."""

    def __init__(self, ref: Any, models: Models, answers: Answers) -> None:
        self._ref = ref
        self._models = models
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(_ASKING):
            self._answers.clear()
            self._models.changed()
        return getattr(self._ref, name)

    async def terminate_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        self._answers.clear()
        self._answers.forget(model_uid)
        self._models.end(model_uid)
        return await self._ref.terminate_model(model_uid, *args, **kwargs)

    async def get_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        served = self._models.get(model_uid)
        if served is not None and not served.is_overdue():
            return await self._admitted(model_uid, (await self._waited(served)).ref)
        known = self._answers.get("get_model", model_uid)
        if known is None or not self._models.links.has(known):  # a link that is lost tells of the process's end
            try:
                known = await self._ref.get_model(model_uid, *args, **kwargs)
            except ValueError:
                self._models.forget(model_uid)
                raise
            if self._models.links.has(known) and await self._is_alone(model_uid):
                self._answers.keep("get_model", model_uid, known)
        return await self._admitted(model_uid, known)

    async def _admitted(self, model_uid: str, ref: Any) -> Model:
        await refusals.check(model_uid, ref)
        return Model(model_uid, ref, self._models)

    async def _waited(self, served: Served) -> Replica:
        """A replica that lives."""
        try:
            return await served.replica_for()
        except RequestError as error:
            from fastapi import HTTPException

            raise HTTPException(UNAVAILABLE, str(error), {"Retry-After": str(RETRY_AFTER)}) from None

    async def _is_alone(self, model_uid: str) -> bool:
        """Whether the model has one replica; of several the supervisor chooses one for each request."""
        try:
            return bool((await self.describe_model(model_uid))["replica"] == 1)
        except Exception:  # the first replica may be loading
            return False

    async def describe_model(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        known = self._answers.get("describe_model", model_uid)
        if known is not None:
            return known
        try:
            known = await self._ref.describe_model(model_uid, *args, **kwargs)
        except Exception:  # it asks the first replica, which may be loading
            known = self._answers.last("describe_model", model_uid)
            if known is None or self._models.get(model_uid) is None:
                raise
            return known
        self._answers.keep("describe_model", model_uid, known)
        return known

    async def resolve_token_router_runtime(self, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        method = "resolve_token_router_runtime"
        if self._answers.get(method, model_uid):
            return None
        known = await self._ref.resolve_token_router_runtime(model_uid, *args, **kwargs)
        if known is None:  # where there is a router, each request asks which of its runtimes is next
            self._answers.keep(method, model_uid, "no router")
        return known


class Model:
    """The reference of a model, whose answers come by a link if it has one."""

    def __init__(self, model_uid: str, ref: Any, models: Models) -> None:
        self._model_uid = model_uid
        self._ref = ref
        self._models = models
        self._stream: Stream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ref, name)

    async def is_vllm_backend(self) -> bool:
        return await self._models.links.is_vllm(self._ref)

    async def chat(self, *args: Any, **kwargs: Any) -> Any:
        return await self._call("chat", args, kwargs)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        return await self._call("generate", args, kwargs)

    async def create_embedding(self, *args: Any, **kwargs: Any) -> Any:
        return await self._pool("create_embedding", args, kwargs)

    async def rerank(self, *args: Any, **kwargs: Any) -> Any:
        return await self._pool("rerank", args, kwargs)

    async def abort_request(self, *args: Any, **kwargs: Any) -> Any:
        ref = self._ref if self._stream is None else self._stream.ref
        return None if ref is None else await asyncio.wait_for(ref.abort_request(*args, **kwargs), ASK)

    async def _pool(self, method: str, args: Any, kwargs: Any) -> Any:
        self._models.links.expect(self._ref)
        return await self._call(method, args, kwargs)

    async def _call(self, method: str, args: Any, kwargs: Any) -> Any:
        request = Request(method, args, kwargs)
        stream = await self._stream_of(request)
        if stream is not None:
            self._stream = stream
            try:
                return await stream.begun()
            except NotBegunError:  # and it does not go on
                self._stream = None
        return await getattr(self._ref, method)(*args, **kwargs)

    async def _stream_of(self, request: Request) -> Stream | None:
        """None where there is no link."""
        served = self._models.get(self._model_uid)
        if served is None:
            linked = await self._models.linked(self._model_uid, self._ref)
            if linked is None or linked[1] is None:
                return None if linked is None else Stream(request, self._models.links, linked[0])
            served = linked[1]
        while (replica := await served.replica_for(request)).peer is not None:
            with contextlib.suppress(LinkLostError):  # just now
                return Stream(request, self._models.links, replica, served)
        self._ref = replica.ref
        return None
