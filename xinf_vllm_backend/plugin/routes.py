"""The REST routes that this package adds to Xinference's."""

from __future__ import annotations

import asyncio
from typing import Any

ASK_TIMEOUT = 5.0  # seconds for one replica to answer


def add(context: Any) -> None:
    """Add our routes to Xinference's API.

    Args:
        context: Xinference's ``APIExtensionContext``.
    """
    import xoscar as xo
    from fastapi import HTTPException, Security
    from fastapi.responses import JSONResponse

    async def ask(status: dict[str, Any]) -> dict[str, Any]:
        uid = status["replica_model_uid"]
        try:
            worker = await xo.actor_ref(address=status["worker_address"], uid="worker")
            model = await worker.get_model(model_uid=uid)
            answer: dict[str, Any] = await xo.wait_for(model.engine_status(), ASK_TIMEOUT)
            return answer
        except Exception as error:  # one replica that cannot answer must not hide the others
            return {"replica": uid, "state": status["status"].lower(), "error": str(error)}

    async def engine(model_uid: str) -> JSONResponse:
        """The engines behind a model: state, processes, and how earlier ones died."""
        supervisor = await context.get_supervisor_ref()
        statuses = [s for s in await supervisor.get_replica_statuses(model_uid) if s["status"] != "TERMINATED"]
        if not statuses:
            raise HTTPException(status_code=404, detail=f"No model {model_uid} is running.")
        return JSONResponse({"replicas": await asyncio.gather(*map(ask, statuses))})

    context.router.add_api_route(
        "/v1/models/{model_uid}/engine",
        engine,
        methods=["GET"],
        dependencies=[Security(context.auth_service, scopes=["models:read"])] if context.auth_enabled else None,
    )
    # Xinference refuses a route whose annotation is not a Response class, and cannot resolve a local name.
    engine.__annotations__["return"] = JSONResponse
