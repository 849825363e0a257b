"""Behind our middleware an application answers as behind starlette's own, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")  # and with it starlette and anyio
sse = pytest.importorskip("sse_starlette.sse")

import anyio  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse  # noqa: E402
from starlette.background import BackgroundTask  # noqa: E402
from starlette.middleware import base  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.types import Message, Receive, Scope, Send  # noqa: E402

from xinf_vllm_backend.plugin import middleware  # noqa: E402
from xinf_vllm_backend.plugin.direct_response import DirectHTTPMiddleware  # noqa: E402

TIMEOUT = 10.0  # seconds; reached only by what hangs
CLASSES = (BaseHTTPMiddleware, DirectHTTPMiddleware)
SETTING = contextvars.ContextVar("SETTING", default="unset")

Call = Callable[[Request], Awaitable[Response]]


class Server:
    """In place of uvicorn: after a response, and when the client has left, ``receive`` returns a disconnect.

    Args:
        leaves_after: chunks with which the client leaves.
    """

    def __init__(self, leaves_after: int | None = None) -> None:
        self.leaves_after = leaves_after
        self.requests = [
            {"type": "http.request", "body": b"ab", "more_body": True},
            {"type": "http.request", "body": b"cd", "more_body": False},
        ]
        self.messages: list[Message] = []
        self.chunks = 0
        self.is_complete = False
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        if not self.requests or self.gone.is_set():
            await self.gone.wait()
            return {"type": "http.disconnect"}
        return self.requests.pop(0)

    async def send(self, message: Message) -> None:
        if self.is_complete:
            raise RuntimeError("The response is complete.")
        if self.gone.is_set():
            return
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.chunks += bool(message.get("body"))
            self.is_complete = not message.get("more_body", False)
        if message["type"] == "http.response.pathsend":
            self.is_complete = True
        if self.is_complete or self.chunks == self.leaves_after:
            self.gone.set()

    def seen(self) -> list[Any]:
        """What the client gets, however it is cut into chunks."""
        body = b"".join(each.get("body", b"") for each in self.messages)
        return [*(each for each in self.messages if "body" not in each), body, self.is_complete]


# Applications. What they note is compared, too.


async def json_answer(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    answer = JSONResponse({"body": body.decode(), "setting": SETTING.get()}, headers={"x-app": "1"})
    await answer(scope, receive, send)


async def many_chunks(scope: Scope, receive: Receive, send: Send) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for number in range(20):
            yield b"%d " % number

    await StreamingResponse(chunks())(scope, receive, send)
    scope["notes"].append("ended")


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"more "
            await asyncio.sleep(0)

    await StreamingResponse(chunks(), background=BackgroundTask(scope["notes"].append, "background"))(
        scope, receive, send
    )


async def events(scope: Scope, receive: Receive, send: Send) -> None:
    async def items() -> AsyncIterator[dict[str, str]]:
        for number in range(5):
            yield {"data": str(number)}

    await _event_source(items(), scope)(scope, receive, send)


async def endless_events(scope: Scope, receive: Receive, send: Send) -> None:
    async def items() -> AsyncIterator[dict[str, str]]:
        try:
            while True:
                yield {"data": "more"}
                await asyncio.sleep(0)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0)
                scope["notes"].append("cleaned up")

    await _event_source(items(), scope)(scope, receive, send)


def _event_source(items: AsyncIterator[dict[str, str]], scope: Scope) -> Any:
    async def left(_: Message) -> None:
        scope["notes"].append("the client left")

    return sse.EventSourceResponse(items, client_close_handler_callable=left)


async def with_background(scope: Scope, receive: Receive, send: Send) -> None:
    async def later() -> None:
        await asyncio.sleep(0)
        scope["notes"].append("background")

    await PlainTextResponse("now", background=BackgroundTask(later))(scope, receive, send)


async def fails_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("at once") from KeyError("cause")


async def fails_amid(scope: Scope, receive: Receive, send: Send) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"some"
        raise ValueError("amid")

    await StreamingResponse(chunks())(scope, receive, send)


async def fails_behind(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("all")(scope, receive, send)
    raise ValueError("behind")


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    scope["notes"].append("silent")


async def unfinished(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 202, "headers": []})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})


async def too_much(scope: Scope, receive: Receive, send: Send) -> None:
    for body in ("one", "two"):
        await PlainTextResponse(body)(scope, receive, send)


async def unusual_messages(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.early_hint", "links": []})
    await send({"type": "http.response.debug", "info": {"template": "t"}})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.pathsend", "path": "/a"})


def fast_api() -> FastAPI:
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()})

    return app


# Dispatch functions.


async def passes(request: Request, call_next: Call) -> Response:
    return await call_next(request)


async def marks(request: Request, call_next: Call) -> Response:
    SETTING.set("set")
    response = await call_next(request)
    response.headers.setdefault("X-Request-ID", "r1")
    response.headers["x-app"] = "2"
    response.status_code += 1
    return response


async def reads_the_body(request: Request, call_next: Call) -> Response:
    body = await request.body()
    response = await call_next(request)
    response.headers["length"] = str(len(body))
    return response


async def drains_the_body(request: Request, call_next: Call) -> Response:
    async for _ in request.stream():
        pass
    return await call_next(request)


async def refuses(request: Request, call_next: Call) -> Response:
    return PlainTextResponse("no", status_code=403)


async def refuses_afterwards(request: Request, call_next: Call) -> Response:
    await call_next(request)
    return PlainTextResponse("no", status_code=403)


async def raises(request: Request, call_next: Call) -> Response:
    raise LookupError("dispatch")


async def raises_afterwards(request: Request, call_next: Call) -> Response:
    await call_next(request)
    raise LookupError("dispatch")


async def answers_for_the_app(request: Request, call_next: Call) -> Response:
    try:
        return await call_next(request)
    except Exception as error:
        return PlainTextResponse(f"{error!r} {error.__cause__!r}", status_code=500)


async def adds_a_background_task(request: Request, call_next: Call) -> Response:
    response = await call_next(request)
    response.background = BackgroundTask(request.scope["notes"].append, "of dispatch")
    return response


async def gives_up(request: Request, call_next: Call) -> Response:
    try:
        return await asyncio.wait_for(call_next(request), 0)
    except asyncio.TimeoutError:
        return PlainTextResponse("late", status_code=504)


APPS = (
    *(json_answer, many_chunks, endless, events, endless_events, with_background, silent, unfinished, too_much),
    *(fails_at_once, fails_amid, fails_behind, unusual_messages),
)
DISPATCHES = (
    *(passes, marks, reads_the_body, drains_the_body, refuses, refuses_afterwards, raises, raises_afterwards),
    *(answers_for_the_app, adds_a_background_task, gives_up),
)
ENDLESS = (endless, endless_events)


def scope_of_a_request(**more: Any) -> Scope:
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [], "client": ("::1", 1)}
    return {**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}, "notes": [], **more}


async def asked(cls: Any, app: Any, dispatch: Any, leaves_after: int | None = None, **scope: Any) -> list[Any]:
    """All that server, caller and application see of a request."""
    server, request = Server(leaves_after), scope_of_a_request(**scope)
    task = asyncio.ensure_future(cls(app, dispatch=dispatch)(request, server.receive, server.send))
    await asyncio.wait([task], timeout=TIMEOUT)
    assert task.done(), "it hangs"
    assert tasks_left() == set()
    error = task.exception()
    cause = None if error is None or isinstance(error.__cause__, anyio.EndOfStream) else error.__cause__
    return [server.seen(), (repr(error), repr(cause)), sorted(request["notes"]), SETTING.get()]


def tasks_left() -> set[Any]:
    """The tasks but the test's own, and the one by which sse_starlette sees a server end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {each for each in others if "_shutdown_watcher" not in repr(each)}


@pytest.fixture(autouse=True)
async def _sse_starlette_watches_no_longer() -> AsyncIterator[None]:
    yield
    watchers = asyncio.all_tasks() - {asyncio.current_task()}
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)


def name(value: Any) -> str:
    return str(getattr(value, "__name__", value))


class TestARequest:
    @pytest.mark.parametrize("dispatch", DISPATCHES, ids=name)
    @pytest.mark.parametrize("app", [app for app in APPS if app not in ENDLESS], ids=name)
    async def test_is_answered_as_behind_starlettes_middleware(self, app: Any, dispatch: Any) -> None:
        if (app, dispatch) == (events, adds_a_background_task):
            pytest.skip("starlette's takes the end of this one for a client that left")
        theirs, ours = [await asked(cls, app, dispatch) for cls in CLASSES]
        assert ours == theirs

    @pytest.mark.parametrize("spec", ["2.3", "2.4"])
    @pytest.mark.parametrize("dispatch", [passes, marks, reads_the_body, adds_a_background_task], ids=name)
    @pytest.mark.parametrize("app", [*ENDLESS, many_chunks, events], ids=name)
    async def test_whose_client_leaves_ends_as_behind_starlettes(self, app: Any, dispatch: Any, spec: str) -> None:
        if app is endless and spec == "2.4":
            pytest.skip("it ends by an error of the server's send, which uvicorn's does not raise")
        asgi = {"version": "3.0", "spec_version": spec}
        theirs, ours = [await asked(cls, app, dispatch, leaves_after=3, asgi=asgi) for cls in CLASSES]
        assert ours == theirs
        assert ours[0][-1] is False
        assert app is not endless_events or {"the client left", "cleaned up"} <= {*ours[2]}

    @pytest.mark.parametrize("app", ENDLESS, ids=name)
    async def test_whose_endless_answer_is_dropped_ends(self, app: Any) -> None:
        theirs, ours = [await asked(cls, app, refuses_afterwards) for cls in CLASSES]
        assert ours == theirs

    async def test_of_fastapi_is_answered_with_the_changed_headers(self) -> None:
        server = Server()
        await DirectHTTPMiddleware(fast_api(), dispatch=marks)(scope_of_a_request(), server.receive, server.send)
        start, body, is_complete = server.seen()
        assert (start["status"], body, is_complete) == (201, b'{"body":"abcd"}', True)
        assert (b"x-request-id", b"r1") in start["headers"]

    async def test_that_ends_well_is_not_taken_for_one_whose_client_left(self) -> None:
        seen, _, notes, _ = await asked(DirectHTTPMiddleware, events, passes)
        assert seen[-2:] == [b"".join(b"data: %d\r\n\r\n" % number for number in range(5)), True]
        assert notes == []

    async def test_chunks_are_sent_as_the_application_made_them(self) -> None:
        server = Server()
        await DirectHTTPMiddleware(json_answer, dispatch=passes)(scope_of_a_request(), server.receive, server.send)
        assert [message["type"] for message in server.messages] == ["http.response.start", "http.response.body"]

    async def test_the_first_chunk_waits_until_the_headers_are_sent(self) -> None:
        waiting = asyncio.Event()

        async def dispatch(request: Request, call_next: Call) -> Response:
            response = await call_next(request)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not server.messages
            waiting.set()
            return response

        server = Server()
        await DirectHTTPMiddleware(many_chunks, dispatch=dispatch)(scope_of_a_request(), server.receive, server.send)
        assert waiting.is_set()
        assert server.messages[0]["type"] == "http.response.start"

    @pytest.mark.parametrize("kind", ["websocket", "lifespan"])
    async def test_other_connections_pass(self, kind: str) -> None:
        seen = []

        async def app(*given: Any) -> None:
            seen.append(given)

        given: Any = ({"type": kind}, object(), object())
        await DirectHTTPMiddleware(app, dispatch=raises)(*given)
        assert seen == [given]

    @pytest.mark.parametrize("failing", ["http.response.start", "http.response.body"])
    async def test_an_error_of_the_server_comes_out(self, failing: str) -> None:
        async def send(message: Message) -> None:
            if message["type"] == failing:
                raise BrokenPipeError(failing)

        for cls in CLASSES:
            with pytest.raises(BrokenPipeError, match=failing):
                await cls(many_chunks, dispatch=passes)(scope_of_a_request(), Server().receive, send)
            assert tasks_left() == set()


class TestCancelling:
    @pytest.mark.parametrize("cls", CLASSES, ids=name)
    @pytest.mark.parametrize("by", ["task", "scope"])
    async def test_the_server_waits_for_what_the_application_shields(self, cls: Any, by: str) -> None:
        started, may_end, notes = asyncio.Event(), asyncio.Event(), []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                with anyio.CancelScope(shield=True):
                    notes.append("begins to clean up")
                    await may_end.wait()
                    notes.append("has cleaned up")

        async def serve() -> None:
            with scope:
                await cls(app, dispatch=passes)(scope_of_a_request(), server.receive, server.send)

        scope, server = anyio.CancelScope(), Server()
        task = asyncio.ensure_future(serve())
        await asyncio.wait_for(started.wait(), TIMEOUT)
        (task if by == "task" else scope).cancel()
        while not notes:
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        await asyncio.wait([task], timeout=TIMEOUT)
        assert notes == ["begins to clean up", "has cleaned up"]
        assert task.cancelled() == (by == "task")
        assert tasks_left() == set()

    @pytest.mark.parametrize("cls", CLASSES, ids=name)
    async def test_an_application_that_has_not_answered_is_cancelled(self, cls: Any) -> None:
        started, notes = asyncio.Event(), []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                notes.append("cancelled")
                raise

        server = Server()
        task = asyncio.ensure_future(cls(app, dispatch=passes)(scope_of_a_request(), server.receive, server.send))
        await asyncio.wait_for(started.wait(), TIMEOUT)
        task.cancel()
        await asyncio.wait([task], timeout=TIMEOUT)
        assert (task.cancelled(), notes, server.messages) == (True, ["cancelled"], [])


def api() -> FastAPI:
    """An application like Xinference's: its dispatch function among others."""

    class Middleware(BaseHTTPMiddleware): ...

    async def audited_ip_middleware(request: Request, call_next: Call) -> Response:
        return await marks(request, call_next)

    audited_ip_middleware.__module__, audited_ip_middleware.__qualname__ = middleware.MODULE, middleware.DISPATCH
    app = fast_api()
    app.middleware("http")(passes)
    app.add_middleware(Middleware, dispatch=audited_ip_middleware)
    app.middleware("http")(audited_ip_middleware)
    return app


def classes(app: Any) -> list[str]:
    return [entry.cls.__name__ for entry in app.user_middleware]


AS_IT_WAS = ["BaseHTTPMiddleware", "Middleware", "BaseHTTPMiddleware"]


class TestInstalling:
    async def test_exchanges_the_middleware_of_xinferences_dispatch_alone(self) -> None:
        app, server = api(), Server()
        middleware.install(app)
        assert classes(app) == ["DirectHTTPMiddleware", "Middleware", "BaseHTTPMiddleware"]
        await app(scope_of_a_request(), server.receive, server.send)
        start, body, is_complete = server.seen()
        assert (start["status"], body, is_complete) == (202, b'{"body":"abcd"}', True)

    @pytest.mark.parametrize(
        ("owner", "gone"),
        [
            (base, "BaseHTTPMiddleware"),
            (base, "_CachedRequest"),
            (base._CachedRequest, "wrapped_receive"),
            ("starlette.middleware", "Middleware"),
            ("starlette.applications", "Starlette"),
        ],
        ids=lambda value: name(value) if not isinstance(value, str) else value.rpartition(".")[2],
    )
    def test_leaves_all_as_it_is_where_starlette_has_changed(
        self, owner: Any, gone: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = api()
        monkeypatch.delattr(*((owner, gone) if not isinstance(owner, str) else (f"{owner}.{gone}",)))
        self.leaves_all(app, caplog, gone)

    def test_leaves_all_as_it_is_where_xinference_has_changed(self, caplog: pytest.LogCaptureFixture) -> None:
        app = api()
        app.user_middleware.pop(0)
        with caplog.at_level(logging.WARNING):
            middleware.install(app)
        assert classes(app) == AS_IT_WAS[1:]
        assert "audited_ip_middleware" in caplog.text

    def test_leaves_all_as_it_is_when_the_application_has_served(self, caplog: pytest.LogCaptureFixture) -> None:
        app = api()
        app.middleware_stack = app.build_middleware_stack()
        self.leaves_all(app, caplog, "audited_ip_middleware")

    def test_takes_a_dispatch_without_a_name_for_none_of_xinferences(self) -> None:
        app = api()
        app.add_middleware(BaseHTTPMiddleware, dispatch=SimpleNamespace())  # type: ignore[arg-type]
        middleware.install(app)
        assert classes(app) == ["BaseHTTPMiddleware", "DirectHTTPMiddleware", *AS_IT_WAS[1:]]

    def leaves_all(self, app: Any, caplog: pytest.LogCaptureFixture, told: str) -> None:
        with caplog.at_level(logging.WARNING):
            middleware.install(app)
        assert classes(app) == AS_IT_WAS
        assert told in caplog.text
