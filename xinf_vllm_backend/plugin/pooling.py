"""Embedding and rerank models: the classes of Xinference that pool, hosted."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import types
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..engine.blocking import BlockingEngine, Requests, calling
from ..engine.seams import platform, pooling
from ..errors import BadLaunchArgumentError
from . import cpu, launch_arguments
from .check import vllm_check
from .hosted import Hosted

logger = logging.getLogger("xinference.vllm_backend")

AT_ONCE = 64  # calls of one model's LLM that run at the same time; more wait for a thread


class HostedPoolingModel(Hosted):
    """A mixin for Xinference's vLLM classes of embedding and rerank models.

    Xinference makes an AsyncLLM for most, whose requests run at the same time, and an ``LLM`` for the rest, whose calls
    it puts together and runs on the event loop. Here each of those has a thread, and the engine puts their requests
    together.
    """

    _served_by: str  # name of the method that answers requests
    _model: Any
    _kwargs: dict[str, Any]
    _model_path: str
    _model_spec: Any

    def __init__(
        self, model_uid: str, model_path: str, model_family: Any, quantization: str | None = None, **arguments: Any
    ) -> None:
        options = self._options_in(arguments)
        if platform.is_cpu_build():
            model_family = cpu.without_vllm(model_family)
        super().__init__(model_uid, model_path, model_family, quantization, **arguments)  # type: ignore[call-arg]
        for name in ("_func", self._served_by):  # by which Xinference makes batches; they cannot be pickled
            vars(self).pop(name, None)
        self.raw_model_uid = model_uid
        self.model_uid = model_uid
        self._engine = None
        self._loop = None
        self._check_health_task = None
        self._host(options, arguments)

    def set_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by the model actor before :meth:`load`."""
        self._loop = loop

    def _directory(self) -> str:
        return str(self._model_path)

    def _asked(self) -> tuple[Any, ...]:
        spec = self._model_spec
        of_weights = self.model_family.model_name, spec.model_format, spec.quantization
        return of_weights, self._given_of(self._kwargs)

    # -- load

    def load(self) -> None:
        """Load the engine on a thread of its own; returns when it is ready.

        Raises:
            BackendError, ValueError: one sentence with the root cause; nothing is left running.
        """
        started = self._begin_load()
        with self._readable_errors():
            self._check_vllm()
            launch_arguments.check_model_directory(Path(self._model_path), self._model_spec.model_format, self._given)
            if platform.is_cpu_build():
                cpu.fill_in(self._kwargs, self._given, self._settings)
                self._environment = cpu.share_cores(self._kwargs)
            make = functools.partial(self._started, started)
            with (
                launch_arguments.environment_kept(),
                pooling.engines_made_by(make, lambda arguments: BlockingEngine(make(arguments), self._loop)),
            ):
                super().load()  # type: ignore[misc]
            if pooling.is_blocking(self._model):
                self._check_pools()
                self._serve_on_threads()

    def wait_for_load(self) -> None:
        """Finish the load, and start the health task on the event loop."""
        with self._readable_errors():
            finish = getattr(super(), "wait_for_load", None)
            if finish is not None:
                finish()
            self._loop.call_soon_threadsafe(self._begin_watch)
        self._greet()

    def _begin_watch(self) -> None:
        if not self._stop_requested:
            self._check_health_task = self._loop.create_task(self._check_healthy())

    def _check_pools(self) -> None:
        if not pooling.pools(self._model):
            self._stop_engine()
            raise BadLaunchArgumentError(
                f"vLLM takes the model in {self._model_path} for one that generates text, so it can neither embed nor "
                "score; launch it with runner=pooling, or as a chat model."
            )

    # -- requests

    def _serve_on_threads(self) -> None:
        """Have each request call the ``LLM`` on a thread of its own."""
        threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pooling")
        answer = vllm_check(_on_thread(threads, getattr(self, self._served_by)))
        setattr(self, self._served_by, types.MethodType(answer, self))


def _on_thread(threads: ThreadPoolExecutor, call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """``call``, which blocks and asks an ``LLM``, as a coroutine method; one that is cancelled ends its requests."""

    async def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        requests = Requests()
        context = contextvars.copy_context()
        run = functools.partial(context.run, _call, requests, call, *args, **kwargs)
        running = asyncio.get_running_loop().run_in_executor(threads, run)
        try:
            return await running
        finally:
            requests.cancel()

    return called


def _call(requests: Requests, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with calling(requests):
        return call(*args, **kwargs)
