"""The engines that Xinference makes for embedding and rerank models, and what vLLM's ``LLM`` asks of its engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from ...errors import UnsupportedVersionError
from .seam import Seam
from .version import version

Factory = Callable[[Any], Any]

_instead: ContextVar[tuple[Factory, Factory] | None] = ContextVar("what makes engines on this thread", default=None)

ASYNC_ENGINE = Seam(
    "vllm.v1.engine.async_llm",
    "AsyncLLM.from_engine_args",
    "hosting embedding and rerank models",
    "their launches are refused",
)
SYNC_ENGINE = Seam(
    "vllm.v1.engine.llm_engine", "LLMEngine.from_engine_args", ASYNC_ENGINE.used_for, ASYNC_ENGINE.without
)
ARGUMENTS = Seam("vllm.engine.arg_utils", "AsyncEngineArgs", ASYNC_ENGINE.used_for, ASYNC_ENGINE.without)
PROGRESS_BAR = Seam(
    "vllm.entrypoints.pooling.offline",
    "tqdm",
    "keeping the progress bar of each request to a model that embeds images out of the log",
    "it is drawn there, which takes time",
)
HOSTING = (ASYNC_ENGINE, SYNC_ENGINE, ARGUMENTS)
REQUEST = Seam(
    "vllm.v1.engine",
    "EngineCoreRequest.pooling_params",
    "sending pooling requests to the engine together",
    "each is sent at once, and steps are smaller",
)


@contextlib.contextmanager
def engines_made_by(make: Factory, make_blocking: Factory) -> Iterator[None]:
    """Replace each engine that is made on this thread.

    Args:
        make: called with ``AsyncEngineArgs``, in place of ``AsyncLLM.from_engine_args``.
        make_blocking: called with ``AsyncEngineArgs``, in place of ``LLMEngine.from_engine_args``; what it returns is
            the ``llm_engine`` of an ``LLM``, and has the methods of :class:`..blocking.BlockingEngine`.

    Raises:
        UnsupportedVersionError: this vLLM makes its engines otherwise.
    """
    if gone := [seam.name for seam in HOSTING if not seam.present()]:
        raise UnsupportedVersionError(
            f"vLLM {version()} has no {', '.join(gone)}, so it cannot run embedding and rerank models; install "
            "another version."
        )
    PROGRESS_BAR.wrap(lambda original: functools.partial(original, disable=True))
    ASYNC_ENGINE.wrap(functools.partial(_replaced, 0))
    SYNC_ENGINE.wrap(functools.partial(_replaced, 1))
    token = _instead.set((make, make_blocking))
    try:
        yield
    finally:
        _instead.reset(token)


def _replaced(kind: int, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_engine_args(engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        factories = _instead.get()
        if factories is None:
            return original(engine_args, *args, **kwargs)
        token = _instead.set(None)  # an engine may make others, which are its own
        try:
            return factories[kind](_asynchronous(engine_args))
        finally:
            _instead.reset(token)

    return from_engine_args


def _asynchronous(engine_args: Any) -> Any:
    """``engine_args``, an ``EngineArgs``, as ``AsyncEngineArgs``."""
    kind = importlib.import_module(ARGUMENTS.module).AsyncEngineArgs
    if isinstance(engine_args, kind):
        return engine_args
    return kind(**{field.name: getattr(engine_args, field.name) for field in dataclasses.fields(engine_args)})


def is_blocking(engine: Any) -> bool:
    """Whether ``engine``, which Xinference made, is an ``LLM``, whose methods block."""
    return hasattr(engine, "llm_engine")


def pools(engine: Any) -> bool:
    """Whether ``engine``, an ``LLM``, has a model that pools."""
    return bool(getattr(engine, "runner_type", "pooling") == "pooling")


def is_of(request: Any) -> bool:
    """Whether ``request``, an ``EngineCoreRequest``, pools."""
    return getattr(request, "pooling_params", None) is not None


def was_aborted(output: Any) -> bool:
    """Whether ``output``, a ``PoolingRequestOutput``, is what vLLM makes up for a request that was aborted: nothing."""
    return bool(output.finished and output.outputs.data.numel() == 0)
