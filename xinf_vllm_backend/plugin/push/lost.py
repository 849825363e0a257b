"""What an error of an actor call says about the model process."""

from __future__ import annotations

import asyncio

from ...errors import EngineDiedError, EngineRestartingError
from ...process.link import LinkLostError


def is_process_lost(error: BaseException) -> bool:
    """Whether ``error`` says that the model process is gone, or is just ending.

    What the model itself raised comes with its address, and is no sign of that: it may have lost a connection itself.
    """
    from xoscar.errors import ActorNotExist, ServerClosed

    if isinstance(error, (ActorNotExist, EngineDiedError)) or "No iterator with id" in str(error):
        return True
    if isinstance(error, (LinkLostError, asyncio.TimeoutError)) or getattr(error, "address", None):
        return False
    return isinstance(error, (ServerClosed, ConnectionError, EOFError, OSError))


def is_silent(error: BaseException) -> bool:
    """Whether ``error`` says that the model process did not answer in time."""
    return isinstance(error, asyncio.TimeoutError) and not getattr(error, "address", None)


def is_passing(error: BaseException) -> bool:
    """Whether the process may serve the request all the same: by another link, or when it has room for it again."""
    is_loading = any(cls.__name__ == "ModelNotReadyError" for cls in type(error).__mro__)
    return isinstance(error, LinkLostError) or is_loading or is_full(error)


def is_away(error: BaseException) -> bool:
    """Whether the process lives, and its engine has not come back for as long as the request waits for it."""
    return isinstance(error, EngineRestartingError)


def is_full(error: BaseException) -> bool:
    """Whether Xinference refused the request because of the ``request_limits`` of the replica."""
    return "Rate limit reached" in str(error)
