"""What a REST client reads about a request that cannot be served.

Xinference answers a chat whose backend raised anything with "check the server logs", and a body that does not validate
with a status of 500. Ours are written for the client, so they are passed on.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from ..errors import BackendError, BadRequestError

_ACTOR = re.compile(r"^(?:\[address=[^\]]*\] )+")
_BODIES = ("CreateCompletionRequest", "CreateChatCompletion")


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
        if isinstance(error, (BackendError, BadRequestError)):
            status = 400 if isinstance(error, BadRequestError) else 503
            raise HTTPException(status_code=status, detail=_ACTOR.sub("", str(error)))
        original(error, sanitize=sanitize)

    RESTfulAPI.handle_request_limit_error = staticmethod(handle)
