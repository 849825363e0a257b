"""``GET /v1/models/{uid}/engine``, in a FastAPI and a cluster that are stubs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.plugin import routes


class HTTPError(Exception):
    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code


class JSONResponse:
    def __init__(self, content: Any) -> None:
        self.body = json.dumps(content)


class Worker:
    def __init__(self, models: dict[str, Any]) -> None:
        self.models = models

    async def get_model(self, model_uid: str) -> Any:
        return self.models[model_uid]


class Model:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def engine_status(self) -> Any:
        if isinstance(self._answer, asyncio.Event):
            await self._answer.wait()
        return self._answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Worker]:
    """The workers by address, in an xoscar and a FastAPI that know nothing else."""
    workers: dict[str, Worker] = {}

    async def actor_ref(address: str, uid: str) -> Worker:
        assert uid == "worker"
        return workers[address]

    modules: dict[str, dict[str, Any]] = {
        "fastapi": {"HTTPException": HTTPError, "Security": lambda service, scopes: (service, scopes)},
        "fastapi.responses": {"JSONResponse": JSONResponse},
        "xoscar": {"actor_ref": actor_ref, "wait_for": asyncio.wait_for},
    }
    put_modules(monkeypatch, modules)
    return workers


def added(statuses: list[dict[str, Any]], auth: bool = False) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The route that :func:`routes.add` adds, and how."""
    found: list[Any] = []

    async def get_replica_statuses(model_uid: str) -> list[dict[str, Any]]:
        return statuses

    async def get_supervisor_ref() -> Any:
        return SimpleNamespace(get_replica_statuses=get_replica_statuses)

    def add_api_route(path: str, route: Callable[..., Any], **how: Any) -> None:
        found.append((route, {"path": path, **how}))

    context = SimpleNamespace(
        router=SimpleNamespace(add_api_route=add_api_route),
        get_supervisor_ref=get_supervisor_ref,
        auth_enabled=auth,
        auth_service="auth",
    )
    routes.add(context)
    ((route, how),) = found
    return route, how


def replica(uid: str, address: str, status: str = "READY") -> dict[str, Any]:
    return {"replica_model_uid": uid, "worker_address": address, "status": status}


async def test_every_replica_is_asked_at_its_own_worker(cluster: dict[str, Worker]) -> None:
    cluster["a"] = Worker({"tiny-rep0": Model({"replica": "tiny-rep0", "deaths": 0})})
    cluster["b"] = Worker({"tiny-rep1": Model({"replica": "tiny-rep1", "deaths": 2})})
    route, _ = added([replica("tiny-rep0", "a"), replica("tiny-rep1", "b"), replica("tiny-rep2", "c", "TERMINATED")])
    shown = json.loads((await route("tiny")).body)
    assert [(each["replica"], each["deaths"]) for each in shown["replicas"]] == [("tiny-rep0", 0), ("tiny-rep1", 2)]


async def test_a_replica_that_does_not_answer_hides_no_other(
    cluster: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ASK_TIMEOUT", 0.1)
    cluster["a"] = Worker({"tiny-rep0": Model({"replica": "tiny-rep0"}), "tiny-rep1": Model(asyncio.Event())})
    route, _ = added([replica("tiny-rep0", "a"), replica("tiny-rep1", "a"), replica("tiny-rep2", "gone", "ERROR")])
    first, hangs, gone = json.loads((await route("tiny")).body)["replicas"]
    assert first == {"replica": "tiny-rep0"}
    assert (hangs["replica"], hangs["state"]) == ("tiny-rep1", "ready") and "error" in hangs
    assert (gone["replica"], gone["state"]) == ("tiny-rep2", "error") and "gone" in gone["error"]


async def test_a_model_that_does_not_run_is_not_found(cluster: dict[str, Worker]) -> None:
    route, _ = added([replica("tiny-rep0", "a", "TERMINATED")])
    with pytest.raises(HTTPError, match="No model tiny is running") as caught:
        await route("tiny")
    assert caught.value.status_code == 404


@pytest.mark.parametrize("auth", [False, True])
def test_reading_it_needs_the_right_to_read_models(cluster: dict[str, Worker], auth: bool) -> None:
    route, how = added([], auth)
    assert (how["path"], how["methods"]) == ("/v1/models/{model_uid}/engine", ["GET"])
    assert how["dependencies"] == ([("auth", ["models:read"])] if auth else None)
    assert route.__annotations__["return"] is JSONResponse  # Xinference refuses a route without
