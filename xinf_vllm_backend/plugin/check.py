"""``vllm_check``: what a request does when its engine died or vLLM failed on it."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from ..engine import diagnosis
from ..engine.seams.exceptions import cause_of, engine_dead_errors, explain_request_error
from ..errors import BackendError, EngineDiedError, EngineStoppedError, RequestError, RequestFailedError

logger = logging.getLogger("xinference.vllm_backend")

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def vllm_check(fn: F) -> F:
    """Wrap a coroutine method of a model, and the async iterator it may return.

    Only the exceptions by which vLLM says that its engine is dead mean a death, which is reported to the model
    (``engine_died``). Any other exception is that request's alone. Exceptions of vLLM's are raised as ours, because a
    supervisor without vLLM could not unpickle them. What leaves here as one of ours is for the client to read; its
    cause is logged with the request's id.
    """

    @functools.wraps(fn)
    async def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = str(kwargs.get("request_id") or "without an id")
        try:
            result = await fn(self, *args, **kwargs)
        except Exception as error:
            await _raise_readable(self, error, request)
            raise
        return _checked_iterator(self, result, request) if hasattr(result, "__aiter__") else result

    return checked  # type: ignore[return-value]


async def _checked_iterator(model: Any, iterable: Any, request: str) -> AsyncIterator[Any]:
    iterator = aiter(iterable)
    try:
        async with contextlib.AsyncExitStack() as closing:
            # Also when the client left: vLLM frees the request when its iterator is closed.
            if hasattr(iterator, "aclose"):
                closing.push_async_callback(iterator.aclose)
            async for item in iterator:
                yield item
    except Exception as error:
        await _raise_readable(model, error, request)
        raise


async def _raise_readable(model: Any, error: Exception, request: str) -> None:
    """Raise ``error`` as one for the client if it is vLLM's or ours; return for any other."""
    if isinstance(error, engine_dead_errors()):
        await _raise_death(model, error, request)
    cause = cause_of(error)
    if cause is None and isinstance(error, BackendError) and not isinstance(error, RequestError):
        cause = error  # written for the operator
    if cause is None:
        return
    ours = explain_request_error(cause, request)
    failed = isinstance(ours, RequestFailedError)
    log = logger.error if failed else logger.info
    trace = error if failed else None  # else the text says it all
    log("The request %s of %s failed: %s", request, model.model_uid, diagnosis.describe(cause), exc_info=trace)
    raise ours from error


async def _raise_death(model: Any, error: Exception, request: str) -> NoReturn:
    if model.is_stopping():
        message = f"The model {model.model_uid} was stopped while the request ran; send it again."
        raise EngineStoppedError(message) from error
    logger.error("The request %s of %s failed: %s", request, model.model_uid, await model.engine_died())
    raise EngineDiedError(
        f"The vLLM engine of {model.model_uid} died while the request {request} ran; send it again later. "
        "Xinference's log has the cause, under that id."
    ) from error
