"""The exceptions of vLLM, as ours."""

from __future__ import annotations

import contextlib
import importlib

from ...errors import BackendError, BadRequestError
from .. import diagnosis


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


def explain_request_error(error: BaseException) -> BadRequestError | BackendError | None:
    """An exception of vLLM's own, which one request raised, as one of ours; None for any other exception.

    vLLM wraps what the input of a request made it raise into an ``EngineGenerateError`` without a text.
    """
    if not type(error).__module__.startswith("vllm."):
        return None
    cause = error.__cause__ or error
    if isinstance(cause, BackendError):
        return type(cause)(str(cause))
    is_clients = isinstance(cause, ValueError) or type(cause).__name__ == "VLLMValidationError"
    return BadRequestError(str(cause)) if is_clients else BackendError(diagnosis.describe(cause))
