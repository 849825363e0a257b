"""The exceptions of vLLM, as ours."""

from __future__ import annotations

import contextlib
import importlib
import traceback

from ...errors import (
    BadRequestError,
    RequestError,
    RequestFailedError,
    RequestNotFoundError,
    UnprocessableRequestError,
)

# vLLM's classes of errors by the class of ours that they become; a class below comes before the one above it.
_CLIENT_ERRORS = {
    "VLLMNotFoundError": RequestNotFoundError,
    "VLLMUnprocessableEntityError": UnprocessableRequestError,
    "VLLMClientError": BadRequestError,
    "VLLMValidationError": BadRequestError,  # no VLLMClientError where vLLM has none
}
_STATUS = {404: RequestNotFoundError, 422: UnprocessableRequestError}
# Where vLLM reads the input of a request. A bare ValueError from there is the client's.
_INPUT = ("vllm.renderers", "vllm.v1.engine.input_processor")


def engine_dead_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which the installed vLLM says that an engine is dead; empty where it has none.

    ``AsyncEngineDeadError`` left vLLM in 0.19, ``EngineDeadError`` is in 0.27.1 to 0.33.0.
    """
    found = []
    for module, name in (
        ("vllm.engine.async_llm_engine", "AsyncEngineDeadError"),
        ("vllm.v1.engine.exceptions", "EngineDeadError"),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def cause_of(error: BaseException) -> BaseException | None:
    """What made vLLM raise ``error`` for one request; None if the exception is not vLLM's.

    vLLM wraps what it did not expect into an ``EngineGenerateError`` without a text.
    """
    if not type(error).__module__.startswith("vllm."):
        return None
    return error.__cause__ or error


def explain_request_error(cause: BaseException, request: str) -> BadRequestError | RequestError:
    """``cause``, which made one request fail, as an error that its client may read.

    A client's error keeps vLLM's text, which is about what the client sent, but for names that were not found: that
    tells where vLLM looked. Any other error has a text of ours.

    Args:
        cause: see :func:`cause_of`.
        request: the id of the request.
    """
    if isinstance(cause, RequestError | BadRequestError):
        return type(cause)(str(cause))
    kind = _client_error(cause)
    if kind is RequestNotFoundError:
        return kind(f"vLLM did not find something that the request {request} names, such as a LoRA.")
    if kind is not None:
        return kind(str(cause))
    if _status(cause) == 503:
        return RequestError(f"vLLM does not take the request {request} just now; send it again later.")
    return RequestFailedError(
        f"vLLM failed on the request {request}, and is likely to fail on it again; Xinference's log has the cause, "
        "under that id."
    )


def _client_error(cause: BaseException) -> type[BadRequestError] | None:
    names = {cls.__name__ for cls in type(cause).__mro__}
    for name, kind in _CLIENT_ERRORS.items():
        if name in names:
            return kind
    status = _status(cause)
    if status is not None and 400 <= status < 500:
        return _STATUS.get(status, BadRequestError)
    return BadRequestError if isinstance(cause, ValueError) and _reads_input(cause) else None


def _status(cause: BaseException) -> int | None:
    """The HTTP status that an exception of vLLM's carries, None if it has none."""
    for name in ("http_status", "status_code"):
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            return int(getattr(cause, name))
    return None


def _reads_input(cause: BaseException) -> bool:
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(cause.__traceback__))
    return any(module == name or module.startswith(f"{name}.") for module in modules for name in _INPUT)
