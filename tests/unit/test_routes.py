"""The routes that this package adds, in a FastAPI and a cluster that are stubs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.errors import ControlError, RequestNotFoundError
from xinf_vllm_backend.plugin import routes
from xinf_vllm_backend.plugin.outcome import Outcome
from xinf_vllm_backend.plugin.refusals import Refusals


class HTTPError(Exception):
    def __init__(self, status_code: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status_code, self.headers = status_code, headers


class JSONResponse:
    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body = json.dumps(content)
        self.status_code, self.headers = status_code, headers


class Request:
    def __init__(self, body: bytes = b"", **query: str) -> None:
        self.query_params = query
        self._body = body

    async def body(self) -> bytes:
        return self._body


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

    async def control_status(self) -> Any:
        return self._answer


class Cluster:
    """The workers by address, and the status of each replica."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.statuses: list[Any] = []

    async def get_replica_statuses(self, model_uid: str) -> list[Any]:
        return self.statuses


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """In an xoscar and a FastAPI that know nothing else."""
    made = Cluster()

    async def actor_ref(address: str, uid: str) -> Any:
        return {"worker": made.workers.get(address), "status_guard": made}[uid]

    modules: dict[str, dict[str, Any]] = {
        "fastapi": {
            "HTTPException": HTTPError,
            "Request": Request,
            "Security": lambda service, scopes: (service, scopes),
        },
        "fastapi.responses": {"JSONResponse": JSONResponse},
        "xoscar": {"actor_ref": actor_ref, "wait_for": asyncio.wait_for},
    }
    put_modules(monkeypatch, modules)
    return made


def added(auth: bool = False) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """By the last word of its path, each route that :func:`routes.add` adds, and how."""
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}

    async def get_supervisor_ref() -> Any:
        return SimpleNamespace(address="supervisor")

    def add_api_route(path: str, route: Callable[..., Any], **how: Any) -> None:
        found[path.removeprefix("/v1/models/{model_uid}/")] = route, how

    context = SimpleNamespace(
        router=SimpleNamespace(add_api_route=add_api_route),
        get_supervisor_ref=get_supervisor_ref,
        auth_enabled=auth,
        auth_service="auth",
    )
    routes.add(context)
    return found


def replica(uid: str, address: str, status: str = "READY") -> Any:
    return SimpleNamespace(replica_model_uid=uid, worker_address=address, status=status)


async def shown(cluster: Cluster) -> list[dict[str, Any]]:
    route, _ = added()["engine"]
    replicas: list[dict[str, Any]] = json.loads((await route("tiny")).body)["replicas"]
    return replicas


class TestTheEngine:
    async def test_every_replica_is_asked_at_its_own_worker(self, cluster: Cluster) -> None:
        cluster.workers["a"] = Worker({"tiny-rep0": Model({"replica": "tiny-rep0", "deaths": 0})})
        cluster.workers["b"] = Worker({"tiny-rep1": Model({"replica": "tiny-rep1", "deaths": 2})})
        gone = replica("tiny-rep2", "c", "TERMINATED")
        cluster.statuses = [replica("tiny-rep0", "a"), replica("tiny-rep1", "b"), gone]
        assert [(each["replica"], each["deaths"]) for each in await shown(cluster)] == [
            ("tiny-rep0", 0),
            ("tiny-rep1", 2),
        ]

    async def test_a_replica_that_does_not_answer_hides_no_other(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(routes, "ASK_TIMEOUT", 0.1)
        models = {"tiny-rep0": Model({"replica": "tiny-rep0"}), "tiny-rep1": Model(asyncio.Event())}
        cluster.workers["a"] = Worker(models)
        failed = replica("tiny-rep2", "a", "ERROR")
        cluster.statuses = [replica("tiny-rep0", "a"), replica("tiny-rep1", "a"), failed]
        first, hangs, gone = await shown(cluster)
        assert first == {"replica": "tiny-rep0"}
        assert (hangs["replica"], hangs["state"]) == ("tiny-rep1", "ready") and "error" in hangs
        assert (gone["replica"], gone["state"]) == ("tiny-rep2", "error") and "tiny-rep2" in gone["error"]

    async def test_a_model_that_does_not_run_is_not_found(self, cluster: Cluster) -> None:
        cluster.statuses = [replica("tiny-rep0", "a", "TERMINATED")]
        with pytest.raises(HTTPError, match="No model tiny is running") as caught:
            await shown(cluster)
        assert caught.value.status_code == 404


class TestRights:
    @pytest.mark.parametrize("auth", [False, True])
    def test_reading_and_changing_need_those_of_xinferences_own_routes(self, cluster: Cluster, auth: bool) -> None:
        found = added(auth)
        scopes = {"engine": "models:read"} | dict.fromkeys(("pause", "resume", "sleep", "wake_up"), "models:write")
        assert found.keys() == scopes.keys()
        for name, (route, how) in found.items():
            assert how["methods"] == ["GET" if name == "engine" else "POST"]
            assert how["dependencies"] == ([("auth", [scopes[name]])] if auth else None)
            assert route.__annotations__["return"] is JSONResponse  # Xinference refuses a route without
            assert route.__annotations__["model_uid"] is str


class Controls:
    """What the routes ask, and what they are answered."""

    def __init__(self, answer: Any = None) -> None:
        self.asked: list[Any] = []
        self.answer = answer or Outcome("tiny", True, "tiny is paused.", [{"control": "paused", "order": {"hold": 0}}])

    async def pause(self, *asked: Any) -> Any:
        return self._answered(asked)

    async def resume(self, *asked: Any) -> Any:
        return self._answered(asked)

    def _answered(self, asked: Any) -> Any:
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def controls(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controls]:
    made = Controls()
    monkeypatch.setattr(routes, "Controls", lambda find: made)
    monkeypatch.setattr(routes, "refusals", Refusals())
    yield made


async def post(action: str, request: Request) -> Any:
    route, _ = added()[action]
    return await route("tiny", request)


class TestPauseAndResume:
    async def test_parameters_are_those_of_the_query_and_of_the_body(self, controls: Controls) -> None:
        answer = await post("pause", Request(b'{"hold": 3, "mode": "keep"}', mode="wait", timeout="9"))
        assert controls.asked == [("tiny", "pause", {"hold": 3, "mode": "wait", "timeout": "9"})]
        assert (answer.status_code, json.loads(answer.body)["state"]) == (200, "paused")

    async def test_sleep_is_a_pause_and_wake_up_is_resume(self, controls: Controls) -> None:
        await post("sleep", Request(level="1"))
        await post("wake_up", Request())
        await post("resume", Request(timeout="7"))
        assert controls.asked == [
            ("tiny", "sleep", {"level": "1"}),
            ("tiny", routes.RESUME_TIMEOUT),
            ("tiny", 7.0),
        ]

    async def test_what_was_not_done_is_a_conflict_and_says_what_is_so_now(self, controls: Controls) -> None:
        controls.answer = Outcome("tiny", False, "It was taken back.", [{"control": "serving"}])
        answer = await post("pause", Request())
        found = json.loads(answer.body)
        assert (answer.status_code, found["detail"], found["state"]) == (409, "It was taken back.", "serving")
        assert answer.headers == {"x-should-retry": "false"}

    @pytest.mark.parametrize(
        ("error", "status"), [(ControlError("Nobody answers."), 409), (RequestNotFoundError("No model."), 404)]
    )
    async def test_errors_are_one_sentence_each(self, controls: Controls, error: Exception, status: int) -> None:
        controls.answer = error
        for action in ("pause", "resume"):
            with pytest.raises(HTTPError, match=str(error)) as caught:
                await post(action, Request())
            assert caught.value.status_code == status

    @pytest.mark.parametrize(
        ("action", "request_"),
        [
            ("pause", Request(b"{")),
            ("pause", Request(b"[]")),
            ("resume", Request(timeout="soon")),
            ("resume", Request(timeout="-1")),
            ("resume", Request(timeout="inf")),
            ("wake_up", Request(mode="abort")),
        ],
    )
    async def test_what_cannot_be_used_is_a_bad_request(
        self, controls: Controls, action: str, request_: Request
    ) -> None:
        with pytest.raises(HTTPError) as caught:
            await post(action, request_)
        assert caught.value.status_code == 400
        assert controls.asked == []


class TestRefusals:
    """Requests to a model that takes none are refused before the answer begins."""

    async def test_begin_with_a_pause_without_hold_and_end_when_it_serves(self, controls: Controls) -> None:
        paused: dict[str, Any] = {"control": "paused", "order": {"hold": 0.0}}
        await routes.refusals.check("tiny", Model(paused))
        await post("pause", Request(hold="0"))
        with pytest.raises(HTTPError, match="The model tiny is paused and takes no requests") as caught:
            await routes.refusals.check("tiny", Model(paused))
        assert (caught.value.status_code, caught.value.headers) == (503, {"Retry-After": "30"})
        await routes.refusals.check("tiny", Model({"control": "serving", "order": None}))
        await routes.refusals.check("tiny", Model(paused))

    async def test_are_not_for_requests_that_wait_nor_where_the_model_does_not_answer(self, controls: Controls) -> None:
        await post("pause", Request(hold="0"))
        await routes.refusals.check("tiny", Model({"control": "paused", "order": {"hold": 5.0}}))
        await routes.refusals.check("tiny", SimpleNamespace())

    async def test_are_not_where_requests_wait(self, controls: Controls) -> None:
        controls.answer = Outcome("tiny", True, "tiny is paused.", [{"control": "paused", "order": {"hold": None}}])
        await post("pause", Request())
        await routes.refusals.check("tiny", Model({"control": "paused", "order": {"hold": 0}}))
