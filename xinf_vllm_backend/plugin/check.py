"""``vllm_check``: what a request does when its engine died."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ..engine.seams.exceptions import engine_dead_errors, explain_request_error
from ..errors import EngineDiedError, EngineStoppedError

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def vllm_check(fn: F) -> F:
    """Wrap a coroutine method of a model, and the async iterator it may return.

    Only the exceptions by which vLLM says that its engine is dead are taken for that; whatever else a request raises
    is that request's alone. A dead engine is reported to the model (``engine_died``), which brings it back. Errors of
    vLLM's own are raised as ours: a supervisor without vLLM could not even unpickle them.
    """

    @functools.wraps(fn)
    async def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = await fn(self, *args, **kwargs)
        except Exception as error:
            await _raise_readable(self, error)
            raise
        return _checked_iterator(self, result) if hasattr(result, "__aiter__") else result

    return checked  # type: ignore[return-value]


async def _checked_iterator(model: Any, iterable: Any) -> AsyncIterator[Any]:
    iterator = aiter(iterable)
    try:
        async with contextlib.AsyncExitStack() as closing:
            # Also when the client left: vLLM frees the request when its iterator is closed.
            if hasattr(iterator, "aclose"):
                closing.push_async_callback(iterator.aclose)
            async for item in iterator:
                yield item
    except Exception as error:
        await _raise_readable(model, error)
        raise


async def _raise_readable(model: Any, error: Exception) -> None:
    """Raise ``error`` as one of ours where it is vLLM's own; return for any other."""
    if not isinstance(error, engine_dead_errors()):
        ours = explain_request_error(error)
        if ours is not None:
            raise ours from error
    elif model.is_stopping():
        message = f"The model {model.model_uid} was stopped while the request ran; send it again."
        raise EngineStoppedError(message) from error
    else:
        raise EngineDiedError(await model.engine_died()) from error
