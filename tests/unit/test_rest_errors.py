"""What REST clients read about requests that failed, in a FastAPI that is a stub."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic.v1 import BaseModel, ValidationError
from stubs import put_modules

from xinf_vllm_backend import errors
from xinf_vllm_backend.plugin import rest_errors


class HTTPError(Exception):
    def __init__(self, status_code: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status_code, self.detail, self.headers = status_code, detail, headers


class JSONResponse:
    def __init__(self, content: Any, status_code: int = 200) -> None:
        self.body, self.status_code = json.dumps(content), status_code


class RESTfulAPI:
    @staticmethod
    def handle_request_limit_error(error: Exception, *, sanitize: bool = False) -> None:
        if "Rate limit" in str(error):
            raise HTTPError(429, f"sanitized={sanitize}")


class App:
    def __init__(self) -> None:
        self.handlers: dict[Any, Callable[[Any, Any], Awaitable[Any]]] = {}

    def add_exception_handler(self, kind: Any, handler: Any) -> None:
        self.handlers[kind] = handler


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A new ``RESTfulAPI`` class, in an Xinference and a FastAPI that have nothing else."""
    cls: Any = type("RESTfulAPI", (), {"handle_request_limit_error": RESTfulAPI.__dict__["handle_request_limit_error"]})
    modules: dict[str, dict[str, Any]] = {
        "fastapi": {"HTTPException": HTTPError, "Request": object},
        "fastapi.responses": {"JSONResponse": JSONResponse},
        "xinference": {},
        "xinference.api": {},
        "xinference.api.restful_api": {"RESTfulAPI": cls},
    }
    put_modules(monkeypatch, modules)
    return cls


@pytest.fixture
def app(api: Any) -> App:
    app = App()
    rest_errors.install(app)
    return app


EXPECTED = {
    errors.BadRequestError: 400,
    errors.RequestNotFoundError: 404,
    errors.UnprocessableRequestError: 422,
    errors.RequestFailedError: 500,
    errors.EngineDiedError: 503,
    errors.EngineStoppedError: 503,
    errors.EngineRestartingError: 503,
    errors.CannotResumeError: 503,
    errors.RequestQuarantinedError: 500,
    errors.EngineStaleError: 503,
}


class TestAnErrorOfOneRequest:
    @pytest.mark.parametrize("sanitize", [False, True])
    @pytest.mark.parametrize(("kind", "status"), EXPECTED.items(), ids=lambda value: getattr(value, "__name__", value))
    def test_has_its_status_and_its_text(
        self, api: Any, app: App, kind: type[Exception], status: int, sanitize: bool
    ) -> None:
        with pytest.raises(HTTPError) as caught:
            api.handle_request_limit_error(kind("Send it again."), sanitize=sanitize)
        assert (caught.value.status_code, caught.value.detail) == (status, "Send it again.")

    def test_is_recognised_as_xoscar_rebuilds_it_and_loses_xoscars_prefix(self, api: Any, app: App) -> None:
        text = "[address=127.0.0.1:1, pid=1] [address=unixsocket:///2, pid=2] It died."
        rebuilt = type("_EngineDiedError", (errors.EngineDiedError,), {"__str__": lambda self: text})()
        with pytest.raises(HTTPError) as caught:
            api.handle_request_limit_error(rebuilt)
        assert (caught.value.status_code, caught.value.detail) == (503, "It died.")


class TestAnErrorForTheOperator:
    @pytest.mark.parametrize("sanitize", [False, True])
    @pytest.mark.parametrize(
        "kind",
        [
            cls
            for _, cls in inspect.getmembers(errors, inspect.isclass)
            if issubclass(cls, errors.BackendError) and not issubclass(cls, errors.RequestError)
        ],
    )
    def test_keeps_its_text_from_the_client(self, api: Any, app: App, kind: type[Exception], sanitize: bool) -> None:
        with pytest.raises(HTTPError) as caught:
            api.handle_request_limit_error(kind("OSError: token=hf_secret"), sanitize=sanitize)
        assert caught.value.status_code == 503
        assert "secret" not in caught.value.detail and "log" in caught.value.detail

    def test_of_a_launch_does_not_pass_here(self) -> None:
        assert rest_errors.answer_to(errors.BadLaunchArgumentError("load_timeout='soon'")) is None


class TestAnyOtherError:
    @pytest.mark.parametrize("sanitize", [False, True])
    def test_is_xinferences(self, api: Any, app: App, sanitize: bool) -> None:
        api.handle_request_limit_error(RuntimeError("anything"), sanitize=sanitize)
        with pytest.raises(HTTPError, match=f"sanitized={sanitize}"):
            api.handle_request_limit_error(RuntimeError("Rate limit reached"), sanitize=sanitize)


class TestAnInvalidBody:
    @staticmethod
    def error(name: str) -> ValidationError:
        model = type(name, (BaseModel,), {"__annotations__": {"max_tokens": int}})
        with pytest.raises(ValidationError) as caught:
            model(max_tokens="many")
        return caught.value

    async def test_of_a_completion_is_answered_with_what_is_wrong(self, app: App) -> None:
        answer = await app.handlers[ValidationError](None, self.error("CreateCompletionRequest"))
        assert answer.status_code == 400
        assert "max_tokens: value is not a valid integer" in json.loads(answer.body)["detail"]

    async def test_of_anything_else_is_xinferences(self, app: App) -> None:
        error = self.error("Something")
        with pytest.raises(ValidationError):
            await app.handlers[ValidationError](None, error)


class TestInstallation:
    def test_is_idempotent(self, api: Any, app: App) -> None:
        once = api.handle_request_limit_error
        rest_errors.install(app)
        assert api.handle_request_limit_error is once

    def test_leaves_an_xinference_without_the_seam_as_it_is(self, api: Any) -> None:
        del api.handle_request_limit_error
        rest_errors.install(App())
        assert not hasattr(api, "handle_request_limit_error")
