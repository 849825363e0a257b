"""How vLLM starts the processes of an engine: from our context, and the launch lock is released when they run.

Most of it is scoped to a thread, so that engines that start at the same time do not see each other's context.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing.connection import Connection, Pipe
from types import SimpleNamespace
from typing import Any

from ...process import environment
from ...process.context import EngineContext
from . import core_client, resuming
from .platform import ld_preload
from .seam import Seam
from .version import version

logger = logging.getLogger(__name__)


INSPECTION_PROCESS = "ModelInspection"
SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


_of_this_thread: ContextVar[EngineContext | None] = ContextVar("engine context", default=None)
_when_spawned: ContextVar[Callable[[], None]] = ContextVar("what follows the start of all processes")
_of_this_process: EngineContext | None = None
_install_lock = threading.Lock()


CONTEXT = Seam(
    "vllm.utils.system_utils",
    "multiprocessing",
    "starting every engine child from our own context: bound to its parent, its output kept",
    "children are spawned by vLLM itself; the root cause of a failure is only in the log, orphans are possible",
)


LOGGING = Seam(
    "vllm.logger",
    "_configure_vllm_root_logger",
    "vLLM's own logging in a model process that was forked after vLLM was imported",
    "what it logs looks there like what Xinference logs",
)


def configure_logging() -> None:
    """Configure vLLM's logger as importing vLLM does."""
    owner = LOGGING.owner()
    if owner is not None:
        owner._configure_vllm_root_logger()


class _Multiprocessing:
    """Takes the place of the module ``multiprocessing`` in vLLM; gives our context where there is one."""

    def get_context(self, method: str | None = None) -> Any:
        return _of_this_thread.get() or _of_this_process or multiprocessing.get_context(method)

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)


def use_everywhere(context: EngineContext) -> None:
    """Start every engine process of this process from ``context``."""
    global _of_this_process
    _of_this_process = context
    _install_context()


def _install_context() -> bool:
    with _install_lock:
        owner = CONTEXT.owner()
        if owner is None:
            return False
        if not isinstance(owner.multiprocessing, _Multiprocessing):
            owner.multiprocessing = _Multiprocessing()
        return True


@contextlib.contextmanager
def starts_from(
    context: EngineContext, when_spawned: Callable[[], None] = lambda: None, resources: list[Any] | None = None
) -> Iterator[None]:
    """Start every engine process that vLLM starts on this thread from ``context``.

    vLLM's own start method is "spawn" inside: some configurations are refused without it, and where the seam is gone
    it is what makes vLLM spawn. What vLLM writes into the environment stays on this thread.

    Args:
        context: makes the children.
        when_spawned: called when all processes of an engine are started and the handshake begins.
        resources: a list for the ``BackgroundResources`` of each client of EngineCore that vLLM makes.
    """
    INSPECTION.wrap(_inspect_in_child)
    resuming.INPUTS.wrap(resuming.cache_in_frontend)
    METRICS.wrap(_one_at_a_time)
    INFO.wrap(_once)
    gone = [
        seam
        for seam, there in ((CONTEXT, _install_context()), (HANDSHAKE, HANDSHAKE.wrap(_announcing_spawned)))
        if not there
    ]
    for seam in gone:
        logger.warning("vLLM %s has no %s: %s", version(), seam.name, seam.without)
    # Children that vLLM makes itself inherit what is really in the environment.
    changed = environment.public if CONTEXT in gone else environment.private
    context_token = _of_this_thread.set(context)
    spawned_token = _when_spawned.set(when_spawned)
    try:
        # LD_PRELOAD here, too: vLLM inspects the model before it sets it.
        variables = SPAWN | ld_preload() | context.environment
        with core_client.resources_recorded_in([] if resources is None else resources), changed(**variables):
            yield
    finally:
        _of_this_thread.reset(context_token)
        _when_spawned.reset(spawned_token)


def start_method() -> str | None:
    """The method by which vLLM starts engine processes here: "spawn" or "fork"; None without vLLM."""
    owner = CONTEXT.owner()
    if owner is None or not hasattr(owner, "get_mp_context"):
        return None
    with starts_from(EngineContext(SPAWN)):
        return str(owner.get_mp_context().get_start_method())


HANDSHAKE = Seam(
    "vllm.v1.engine.utils",
    "wait_for_engine_startup",
    "releasing the launch lock when the engine's processes are started",
    "engines of one process start one after the other, each until it is ready",
)


METRICS = Seam(
    "vllm.v1.metrics.loggers",
    "StatLoggerManager.__init__",
    "engines of one process that become ready at the same moment",
    "one of them may fail to start: vLLM registers its metrics twice",
)
INFO = Seam(
    "vllm.v1.metrics.loggers",
    "StatLoggerManager.log_engine_initialized",
    METRICS.used_for,
    METRICS.without,
)
_metrics_lock = threading.Lock()


def _one_at_a_time(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def alone(*args: Any, **kwargs: Any) -> None:
        with _metrics_lock:
            original(*args, **kwargs)

    return alone


def _once(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def logged(*args: Any, **kwargs: Any) -> None:
        try:
            with _metrics_lock:
                original(*args, **kwargs)
        except ValueError as error:  # another engine has said so since the metrics were made
            logger.debug("The configuration of an engine is not among the metrics: %s", error)

    return logged


def _announcing_spawned(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def announced(*args: Any, **kwargs: Any) -> Any:
        _when_spawned.get(lambda: None)()
        return original(*args, **kwargs)

    return announced


INSPECTION = Seam(
    "vllm.model_executor.models.registry",
    "_run_in_subprocess",
    "running the inspection of a new architecture in a process that is bound to its parent",
    "a cancelled first launch of an architecture leaves its inspection running for some seconds",
)


def _inspect_in_child(original: Callable[[Callable[[], Any]], Any]) -> Callable[[Callable[[], Any]], Any]:
    @functools.wraps(original)
    def inspect(fn: Callable[[], Any]) -> Any:
        context = _of_this_thread.get()
        return original(fn) if context is None else _call_in_child(context, fn)

    return inspect


def _call_in_child(context: EngineContext, fn: Callable[[], Any]) -> Any:
    import cloudpickle

    receiver, sender = Pipe(duplex=False)
    with receiver, sender:
        child = context.Process(target=_send_result, name=INSPECTION_PROCESS, args=(sender, cloudpickle.dumps(fn)))
        child.start()
        sender.close()
        try:
            answer = receiver.recv_bytes()  # bounded by load_timeout, which kills the child
        except EOFError:
            answer = None
        child.join()
        if answer is None:
            raise RuntimeError(f"the inspection of the model's architecture ended with {child.exitcode}")
        return pickle.loads(answer)


def _send_result(sender: Connection, pickled_fn: bytes) -> None:
    sender.send_bytes(pickle.dumps(pickle.loads(pickled_fn)()))


ENGINE_CLASS = Seam(
    "vllm.engine.async_llm_engine",
    "AsyncLLMEngine",
    "replacing the engine that Xinference makes",
    "no launch works",
    vital=True,
)


@contextlib.contextmanager
def engine_made_by(factory: Callable[[Any], Any], seam: Seam = ENGINE_CLASS) -> Iterator[None]:
    """Let ``AsyncLLMEngine.from_engine_args(args, ...)`` be ``factory(args)`` inside the context.

    Args:
        factory: makes the engine from a ``vllm.AsyncEngineArgs``.
        seam: the name ``AsyncLLMEngine`` in the module that takes the engine from there.
    """
    module: Any = importlib.import_module(seam.module)
    original = module.AsyncLLMEngine
    module.AsyncLLMEngine = SimpleNamespace(from_engine_args=lambda engine_args, *_, **__: factory(engine_args))
    try:
        yield
    finally:
        module.AsyncLLMEngine = original
