"""The middleware of Xinference's API that every response passes, exchanged for a cheaper one.

Starlette's own puts each chunk of a body through a stream between two tasks, and makes a task group for each message
that is received.
"""

from __future__ import annotations

import logging
from typing import Any

from ..engine.seams.seam import Seam

logger = logging.getLogger("xinference.vllm_backend")

MIDDLEWARE = Seam(
    "starlette.middleware.base",
    "BaseHTTPMiddleware",
    "sending the API's responses without a stream between two tasks",
    "each chunk passes one",
    members=("app", "dispatch_func"),
)
REQUEST = Seam(
    "starlette.middleware.base",
    "_CachedRequest",
    MIDDLEWARE.used_for,
    MIDDLEWARE.without,
    members=("wrapped_receive",),
)
ENTRY = Seam(
    "starlette.middleware",
    "Middleware",
    MIDDLEWARE.used_for,
    MIDDLEWARE.without,
    members=("cls", "kwargs"),
)
APP = Seam(
    "starlette.applications",
    "Starlette",
    MIDDLEWARE.used_for,
    MIDDLEWARE.without,
    members=("user_middleware", "middleware_stack"),
)
SEAMS = (MIDDLEWARE, REQUEST, ENTRY, APP)

# The one dispatch function of Xinference. It and what it calls (ip_restriction_middleware, _audit_middleware) use of a
# response its status and headers alone, which is what ours has.
MODULE = "xinference.api.restful_api"
DISPATCH = "RESTfulAPI.serve.<locals>.audited_ip_middleware"


def install(app: Any) -> None:
    """Have the responses of ``app``, Xinference's, sent directly; nothing else is changed.

    Args:
        app: a Starlette application that has not served yet.
    """
    gone = [seam.name for seam in SEAMS if not seam.present()]
    entries = [] if gone else [each for each in app.user_middleware if _is_xinferences(each)]
    if not entries or app.middleware_stack is not None:
        why = f"there is no {', '.join(gone or [DISPATCH])} that can be exchanged"
        logger.warning("Each chunk of a response passes a stream between two tasks: %s", why)
        return
    from .direct_response import DirectHTTPMiddleware

    for entry in entries:
        entry.cls = DirectHTTPMiddleware


def _is_xinferences(entry: Any) -> bool:
    dispatch = entry.kwargs.get("dispatch")
    name = getattr(dispatch, "__module__", None), getattr(dispatch, "__qualname__", None)
    return entry.cls is MIDDLEWARE.owner().BaseHTTPMiddleware and name == (MODULE, DISPATCH)
