"""The REST routes that this package adds to Xinference's."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

from ..errors import BadRequestError, ControlError
from . import replicas
from .control import RESUME_TIMEOUT, Controls, Outcome
from .refusals import refusals
from .replicas import Replica
from .rest_errors import STATUS

ASK_TIMEOUT = 5.0  # seconds for one replica to answer
CONFLICT = 409
NOT_AGAIN = {"x-should-retry": "false"}  # the OpenAI client repeats what is answered by 409 unless it is told not to


def add(context: Any) -> None:
    """Add our routes to Xinference's API.

    Args:
        context: Xinference's ``APIExtensionContext``.
    """
    from fastapi import HTTPException, Request, Security
    from fastapi.responses import JSONResponse

    find = functools.partial(replicas.find, context.get_supervisor_ref)
    controls = Controls(find)

    async def engine(model_uid: str) -> JSONResponse:
        """The engines behind a model: state, processes, pauses, and how earlier ones died."""
        found = await find(model_uid)
        if not found:
            raise HTTPException(status_code=404, detail=f"No model {model_uid} is running.")
        return JSONResponse({"replicas": await asyncio.gather(*map(_ask, found))})

    async def carried_out(action: str, model_uid: str, request: Request) -> JSONResponse:
        """Pause, resume, put to sleep or wake up all replicas of a model; see docs/control.md."""
        try:
            given = _given(request.query_params, await request.body())
            if action in ("pause", "sleep"):
                outcome = await _paused(controls, model_uid, action, given)
            else:
                outcome = await controls.resume(model_uid, _timeout(given))
        except (BadRequestError, ControlError) as error:
            status = next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), CONFLICT)
            raise HTTPException(status, str(error), NOT_AGAIN) from None
        if outcome.done:
            return JSONResponse(outcome.as_dict())
        return JSONResponse({"detail": outcome.reason, **outcome.as_dict()}, CONFLICT, NOT_AGAIN)

    def route(action: str, endpoint: Any, method: str, scope: str) -> None:
        # Xinference refuses a route whose annotation is not a Response class, and cannot resolve a local name.
        names = {"model_uid": str, "request": Request, "return": JSONResponse}
        endpoint.__annotations__ = {name: names[name] for name in endpoint.__annotations__}
        context.router.add_api_route(
            f"/v1/models/{{model_uid}}/{action}",
            endpoint,
            methods=[method],
            dependencies=[Security(context.auth_service, scopes=[scope])] if context.auth_enabled else None,
        )

    route("engine", engine, "GET", "models:read")
    for action in ("pause", "resume", "sleep", "wake_up"):
        route(action, _endpoint(carried_out, action), "POST", "models:write")


def _endpoint(carried_out: Any, action: str) -> Any:
    async def endpoint(model_uid: str, request: Any) -> Any:
        return await carried_out(action, model_uid, request)

    endpoint.__name__, endpoint.__doc__ = f"{action}_model", carried_out.__doc__
    return endpoint


async def _ask(replica: Replica) -> dict[str, Any]:
    import xoscar as xo

    try:
        answer: dict[str, Any] = await xo.wait_for(_status(replica), ASK_TIMEOUT)
        return answer
    except Exception as error:  # one replica that cannot answer must not hide the others
        return {"replica": replica.uid, "state": replica.status.lower(), "error": str(error)}


async def _status(replica: Replica) -> Any:
    return await (await replica.model()).engine_status()


async def _paused(controls: Controls, model_uid: str, action: str, given: dict[str, Any]) -> Outcome:
    outcome = await controls.pause(model_uid, action, given)
    if outcome.done and any((each.get("order") or {}).get("hold") == 0 for each in outcome.replicas):
        refusals.note(model_uid)
    return outcome


def _given(query: Any, body: bytes) -> dict[str, Any]:
    """The parameters of a request, those of its body and those of its query."""
    try:
        fields = json.loads(body) if body.strip() else {}
    except ValueError as error:
        raise BadRequestError(f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise BadRequestError("The body is no JSON object.")
    return {**fields, **query}


def _timeout(given: dict[str, Any]) -> float:
    try:
        timeout = float(given.pop("timeout", RESUME_TIMEOUT))
    except (TypeError, ValueError):
        timeout = 0.0
    if not 0 < timeout < float("inf"):
        raise BadRequestError("timeout cannot be used: it is a number of seconds above 0.")
    if given:
        raise BadRequestError(f"{', '.join(given)} cannot be given; timeout can.")
    return timeout
