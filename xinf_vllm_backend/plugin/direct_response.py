"""A middleware whose response passes what the application sends straight to the server."""

from __future__ import annotations

import asyncio
import inspect

import anyio
import anyio.lowlevel
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, _CachedRequest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TAKES_SEND = "send" in inspect.signature(_CachedRequest).parameters  # Starlette 1.9 does, 1.7 does not


class DirectHTTPMiddleware(BaseHTTPMiddleware):
    """As starlette's, for dispatch functions that leave the body of a response alone.

    The response of ``call_next`` has no ``body_iterator``. Chunks are sent as the application made them; starlette's
    leaves out empty ones, and sends the end of a body as a message of its own.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The application gets what dispatch has read of the body.
        request = _CachedRequest(scope, receive, *([send] if _TAKES_SEND else []))
        responses: list[DirectResponse] = []
        error: Exception | None = None

        async def call_next(_: Request) -> Response:
            response = DirectResponse(request.wrapped_receive, send)
            responses.append(response)
            tasks.start_soon(response.run, self.app, scope)
            await response.until_started()
            return response

        # A group of anyio's, so that a cancelled application can shield what it has to finish.
        async with anyio.create_task_group() as tasks:
            try:
                response = await self.dispatch_func(request, call_next)
                await response(scope, request.wrapped_receive, send)
                for each in responses:
                    each.drop()
            except Exception as caught:  # not out of the group, which would make an ExceptionGroup of it
                error = caught
                tasks.cancel_scope.cancel()
        for raised in (error, *(each.error for each in responses)):
            if raised is not None:
                raise raised


class DirectResponse(Response):
    """The response of an application, which waits behind its status and headers until it is sent.

    Args:
        receive: of the server.
        send: of the server.

    Attributes:
        error: what the application raised, if ``until_started`` did not raise it.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.background: BackgroundTask | None = None
        self.error: Exception | None = None
        self._receive = receive
        self._send = send
        self._info: Message | None = None
        self._has_start = self._is_open = self._is_complete = False
        self._started, self._opened, self._finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._to_app, self._from_app)
        except Exception as error:
            self.error = error
        finally:
            self._started.set()
            self._finished.set()

    async def until_started(self) -> None:
        """Wait for the status and headers.

        Raises:
            Exception: what the application raised before.
            RuntimeError: it ended without a response.
        """
        await self._started.wait()
        if self._has_start:
            return
        error, self.error = self.error, None
        raise error or RuntimeError("No response returned.")

    async def _to_app(self) -> Message:
        message = await self._receive()
        if self._is_complete:  # a server says then that the client left: what listens for that is cancelled first
            await anyio.lowlevel.checkpoint()
        return message

    async def _from_app(self, message: Message) -> None:
        if not self._has_start:
            await self._before_body(message)
            return
        if not self._is_open:
            await self._opened.wait()
        if not self._is_complete:
            self._is_complete = not message.get("more_body", False)
            await self._send(message)

    async def _before_body(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status_code, self.raw_headers = message["status"], message.get("headers", [])
            self._has_start = True
            self._started.set()
        elif message["type"] == "http.response.debug":
            self._info = message
        elif not self._is_complete:  # early hints
            await self._send(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, and wait until the application has ended."""
        if self._info is not None:
            await send(self._info)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._open()
        await self._finished.wait()
        if not self._is_complete:  # the application failed, or saw that the client left
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self.background is not None:
            await self.background()

    def drop(self) -> None:
        """Have the application run to its end for nothing, if the response was not sent."""
        if not self._is_open:
            self._is_complete = True
            self._open()

    def _open(self) -> None:
        self._is_open = True
        self._opened.set()
