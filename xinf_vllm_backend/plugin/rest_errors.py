"""What a REST client reads about a request that cannot be served.

Xinference answers a chat whose backend raised anything with "check the server logs", and a body that does not validate
with a status of 500. Our request errors are written for the client, so they are passed on.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from ..errors import (
    BackendError,
    BadRequestError,
    RequestError,
    RequestFailedError,
    RequestNotFoundError,
    RequestQuarantinedError,
    UnprocessableRequestError,
)

# The HTTP status of each class of errors that clients read, and of those below it that are not here.
STATUS: dict[type[Exception], int] = {
    BadRequestError: 400,
    RequestNotFoundError: 404,
    UnprocessableRequestError: 422,
    RequestFailedError: 500,
    RequestQuarantinedError: 500,  # it must not be sent again as it is
    RequestError: 503,
}
UNAVAILABLE = 503
RETRY_AFTER = 30  # seconds after which a client may try again
_NOT_FOR_CLIENTS = "The model cannot serve the request; send it again later. Xinference's log has the cause."
_ACTOR = re.compile(r"^(?:\[address=[^\]]*\] )+")
_BODIES = ("CreateCompletionRequest", "CreateChatCompletion")


def answer_to(error: Exception) -> tuple[int, str] | None:
    """Status and text with which a request that raised ``error`` is answered; None if it is not one of ours.

    A ``BackendError`` that is no ``RequestError`` may hold what was cut from logs, so its text is kept from clients.
    """
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls], text_of(error)
    return (503, _NOT_FOR_CLIENTS) if isinstance(error, BackendError) else None


def text_of(error: BaseException) -> str:
    """The text of ``error``, without the address that xoscar puts before it."""
    return _ACTOR.sub("", str(error))


def install(app: Any) -> None:
    """Let our errors and invalid bodies of completions and chats reach the client; idempotent.

    Args:
        app: Xinference's FastAPI application.
    """
    from fastapi import HTTPException, Request
    from fastapi.responses import JSONResponse
    from pydantic.v1 import ValidationError
    from xinference.api.restful_api import RESTfulAPI

    async def invalid_body(request: Request, error: ValidationError) -> JSONResponse:
        if error.model.__name__ not in _BODIES:
            raise error
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        return JSONResponse({"detail": f"The request is not valid: {wrong}."}, status_code=400)

    app.add_exception_handler(ValidationError, invalid_body)

    original = getattr(RESTfulAPI, "handle_request_limit_error", None)  # every failed request passes it
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def handle(error: Exception, *, sanitize: bool = False) -> None:
        ours = answer_to(error)  # fit for clients, sanitized or not
        if ours is not None:
            raise HTTPException(*ours, {"Retry-After": str(RETRY_AFTER)} if ours[0] == UNAVAILABLE else None)
        original(error, sanitize=sanitize)

    RESTfulAPI.handle_request_limit_error = staticmethod(handle)
