"""AsyncLLM, its client of EngineCore, and what passes between them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib
import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from .seam import Seam
from .version import version

logger = logging.getLogger(__name__)


RELEASE_TIMEOUT = 2.0  # seconds
ASK_INTERVAL = 1.0  # seconds between two heartbeats that could not be sent
_SOCKETS = (
    "output_socket",
    "input_socket",
    "first_req_send_socket",
    "first_req_rcv_socket",
    "scale_send_socket",  # the two above, since 0.33
    "scale_rcv_socket",
    "stats_update_socket",
)
_TASKS = ("output_queue_task", "stats_update_task")
HELD = (*_SOCKETS, *_TASKS)  # attributes of BackgroundResources that are released


_wrap_client: ContextVar[Callable[[Any], Any]] = ContextVar("what takes the place of the client of EngineCore")
_resources: ContextVar[list[Any]] = ContextVar("resources of the clients of EngineCore that were made")


ENGINE = Seam(
    "vllm.v1.engine.async_llm",
    "AsyncLLM",
    "serving",
    "no launch works",
    members=("from_engine_args", "engine_core", "output_processor", "shutdown"),
    vital=True,
)
CLIENT = Seam(
    "vllm.v1.engine.core_client",
    "EngineCoreClient.make_async_mp_client",
    "restarting an engine in place, its requests going on",
    "an engine that died ends its model process, and Xinference starts the model again",
)
CALLS = Seam(
    "vllm.v1.engine.core_client",
    "AsyncMPClient",
    "sending requests and receiving their outputs",
    "no request is served",
    members=("add_request_async", "abort_requests_async", "get_output_async", "shutdown", "resources"),
    vital=True,
)
EXECUTOR = Seam("vllm.v1.executor.abstract", "Executor.get_class", CLIENT.used_for, CLIENT.without)


@contextlib.contextmanager
def client_replaced_by(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace each client of EngineCore that vLLM makes on this thread by ``wrap(client)``."""
    if not CLIENT.wrap(_replace_client):
        logger.warning("vLLM %s has no %s: %s", version(), CLIENT.name, CLIENT.without)
    token = _wrap_client.set(wrap)
    try:
        yield
    finally:
        _wrap_client.reset(token)


def _replace_client(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapping(*args: Any, **kwargs: Any) -> Any:
        return _wrap_client.get(lambda client: client)(original(*args, **kwargs))

    return wrapping


def make_async_llm(engine_args: Any) -> Any:
    """Start an engine and return its AsyncLLM; blocks until it is ready.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs``; it stays as it is.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(copy.deepcopy(engine_args))


def make_client(engine_args: Any) -> Any:
    """Start the processes of a restarted engine and return vLLM's client of them; blocks until they are ready.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs``; it stays as it is: a configuration that is used twice adds up blocks.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor.abstract import Executor

    engine_args = copy.deepcopy(engine_args)
    for transfer in ("kv_transfer_config", "ec_transfer_config"):
        _renew_engine_id(getattr(engine_args, transfer, None))
    config = engine_args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    return EngineCoreClient.make_async_mp_client(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=not engine_args.disable_log_stats,
    )


def client_of(engine: Any) -> Any:
    """The client of EngineCore that ``engine``, an AsyncLLM, has."""
    return engine.engine_core


def _renew_engine_id(transfer: Any) -> None:
    """Give a transfer configuration, an object or a dictionary, an id that no peer has registered for a dead engine."""
    fields = transfer if isinstance(transfer, dict) else getattr(transfer, "__dict__", {})
    if fields.get("engine_id"):
        fields["engine_id"] = f"{fields['engine_id']}-{uuid.uuid4().hex[:8]}"
    for part in (fields.get("kv_connector_extra_config") or {}).get("connectors", ()):  # of a MultiConnector
        _renew_engine_id(part)


CONTROL = Seam(
    "vllm.v1.engine.async_llm",
    "AsyncLLM",
    "pausing and sleeping",
    "a pause fails, and its model serves on",
    members=("pause_generation", "resume_generation", "sleep", "wake_up", "abort"),
)


async def end_requests(engine: Any, request_ids: list[str]) -> None:
    """End requests of ``engine``, an AsyncLLM, with what they have been given.

    Args:
        request_ids: internal ids.
    """
    if request_ids:
        await engine.abort(request_ids, internal=True)


async def pause(engine: Any, mode: str, clear_cache: bool) -> None:
    """Return when ``engine``, an AsyncLLM, steps no more."""
    await engine.pause_generation(mode=mode, clear_cache=clear_cache)


async def resume(engine: Any) -> None:
    """Have ``engine``, an AsyncLLM, step again."""
    await engine.resume_generation()


async def put_to_sleep(engine: Any, level: int) -> None:
    """Put ``engine``, an AsyncLLM, to sleep, its requests kept."""
    await engine.sleep(level=level, mode="keep")


async def awaken(engine: Any, level: int) -> None:
    """Wake ``engine``, an AsyncLLM, from a sleep of that level."""
    await engine.wake_up()
    if level > 1:  # which keeps no weights
        await engine.collective_rpc("reload_weights")


OUTPUTS_QUEUE = Seam(
    "vllm.v1.engine.core_client",
    "AsyncMPClient.outputs_queue",
    "ending the wait for outputs of a hung engine, and streams that go on after their model process died",
    "it ends when vLLM sees the engine die, and they fail",
)


def wake(client: Any) -> None:
    """End the wait for an output of ``client``, with an error."""
    queue = getattr(client, "outputs_queue", None)
    if queue is not None:
        queue.put_nowait(RuntimeError("the engine is gone"))


def feed(client: Any, outputs: Any) -> None:
    """Have ``client`` return ``outputs`` as if its engine had sent them."""
    client.outputs_queue.put_nowait(outputs)


def is_dead(client: Any) -> bool:
    """Whether ``client`` knows that its engine is dead."""
    return bool(getattr(getattr(client, "resources", None), "engine_dead", False))


HEARTBEAT = Seam(
    "vllm.v1.engine.core_client",
    "AsyncMPClient.is_scheduler_paused_async",
    "asking an engine for a sign of life",
    "hangs are found by the state and the work of processes alone, while requests are in flight",
)


def has_heartbeat(client: Any) -> bool:
    """Whether ``client`` can ask its engine for a sign of life."""
    return hasattr(client, "is_scheduler_paused_async")


async def ask_sign_of_life(client: Any, rank: int | None = None) -> None:
    """Return when EngineCore answers, between two steps; an answer that is an error is a sign of life, too.

    Where it cannot be asked this does not return, so cancel it.

    Args:
        rank: the one to ask, of :func:`ranks`; None asks as vLLM does.
    """
    while True:
        try:
            if rank is None:
                await client.is_scheduler_paused_async()
            else:
                await client._call_utility_async("is_scheduler_paused", engine=_identity(rank))
            return
        except Exception as error:
            if is_answer(error):
                return
            await asyncio.sleep(ASK_INTERVAL)


def is_answer(error: Exception) -> bool:
    """Whether an engine has answered a call with ``error``, and not this process."""
    # vLLM raises what the engine answered as an Exception, and answers that differ as a RuntimeError.
    return type(error) in (Exception, RuntimeError)


RANKS = Seam(
    "vllm.v1.engine.core_client",
    "MPClient.core_engines",
    "telling the data-parallel ranks of an engine apart",
    "a rank that hangs is not found while another gives outputs",
)
ASK_RANK = Seam(
    "vllm.v1.engine.core_client",
    "AsyncMPClient._call_utility_async",
    "asking one data-parallel rank for a sign of life",
    RANKS.without,
)
OUTPUT_RANK = Seam("vllm.v1.engine", "EngineCoreOutputs.engine_index", RANKS.used_for, RANKS.without)


def ranks(client: Any) -> tuple[int, ...]:
    """The data-parallel ranks of the engine behind ``client``; empty if it has one, or they cannot be told apart."""
    identities = getattr(client, "core_engines", ())
    if len(identities) < 2 or not (ASK_RANK.present() and OUTPUT_RANK.present()):
        return ()
    return tuple(int.from_bytes(identity, "little") for identity in identities)


def _identity(rank: int) -> bytes:
    return rank.to_bytes(2, "little")


def rank_of(outputs: Any) -> int:
    """The data-parallel rank that made ``outputs``, an ``EngineCoreOutputs``."""
    rank: int = getattr(outputs, "engine_index", 0)
    return rank


OUTPUT_TASK = Seam(
    "vllm.v1.engine.async_llm",
    "AsyncLLM.output_handler",
    "noticing that vLLM no longer reads outputs",
    "it is noticed by the next request",
)


def output_task_error(engine: Any) -> BaseException | None:
    """How the task by which ``engine``, an AsyncLLM, reads outputs ended; None while it runs or has not begun."""
    task = getattr(engine, "output_handler", None)
    if task is None or not task.done():
        return None
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception() or RuntimeError("vLLM's task that reads outputs has ended; the log above says why")


REQUEST = Seam(
    "vllm.v1.engine",
    "EngineCoreRequest",
    "telling requests apart",
    "no request is served",
    members=("request_id", "external_req_id"),
    vital=True,
)


def identify(request: Any) -> tuple[str, str]:
    """The internal id of an ``EngineCoreRequest``, and the id by which its client knows it."""
    return request.request_id, request.external_req_id or request.request_id


def prompt_length(request: Any) -> int | None:
    """Number of tokens in the prompt of an ``EngineCoreRequest``; None for a prompt of embeddings."""
    tokens = request.prompt_token_ids
    return None if tokens is None else len(tokens)


def prompt_ids(request: Any) -> list[int] | None:
    """Token ids of the prompt of an ``EngineCoreRequest``; None for a prompt of embeddings."""
    ids: list[int] | None = request.prompt_token_ids
    return ids


LORA = Seam(
    "vllm.lora.request",
    "LoRARequest.lora_int_id",
    "LoRA adapters that a restarted engine has again",
    "adapters cannot be added while an engine runs",
)


def lora_id(request: Any) -> int:
    """The id of the adapter of a ``LoRARequest``."""
    return int(request.lora_int_id)


OUTPUT = Seam(
    "vllm.v1.engine",
    "EngineCoreOutput",
    "noting what requests have been given",
    "no request is served",
    members=("request_id", "new_token_ids", "finish_reason"),
    vital=True,
)
OUTPUTS = Seam("vllm.v1.engine", "EngineCoreOutputs.outputs", OUTPUT.used_for, OUTPUT.without, vital=True)


def delivered(outputs: Iterable[Any]) -> Iterator[tuple[str, list[int], str | None]]:
    """Of each ``EngineCoreOutput``: the request's internal id, the new token ids, and the reason if it is the last."""
    for output in outputs:
        reason = output.finish_reason
        yield output.request_id, output.new_token_ids, None if reason is None else str(reason)


def drop(outputs: Any, request_ids: Collection[str]) -> None:
    """Take the outputs of the requests ``request_ids``, internal ids, out of an ``EngineCoreOutputs``."""
    outputs.outputs = [output for output in outputs.outputs if output.request_id not in request_ids]


RESOURCES = Seam(
    "vllm.v1.engine.core_client",
    "BackgroundResources",
    "releasing the sockets and threads of an engine that ended",
    "they are left to the garbage collector, which may wait for them",
    members=("ctx",),
)


@contextlib.contextmanager
def resources_recorded_in(made: list[Any]) -> Iterator[None]:
    """Add to ``made`` the ``BackgroundResources`` of each client of EngineCore that vLLM makes on this thread."""
    RESOURCES.wrap(_record_resources)
    token = _resources.set(made)
    try:
        yield
    finally:
        _resources.reset(token)


def _record_resources(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def recording(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        _resources.get([]).append(made)
        return made

    return recording


def release(resources: Any) -> None:
    """Release what vLLM's client of an engine that is gone holds in this process; blocks for up to 2 s.

    vLLM closes its sockets on the loop that they served, which may be closed by then, and leaves their context to the
    garbage collector, which would wait without bound for an open socket, on any thread.

    Args:
        resources: the client's ``BackgroundResources``. Where it served no loop, call this on the thread that made it.
    """
    context = getattr(resources, "ctx", None)
    if context is None or context.closed:
        return
    socket_class: Any = importlib.import_module("zmq").Socket
    tasks = [task for name in _TASKS if (task := getattr(resources, name, None)) is not None]
    loop = tasks[0].get_loop() if tasks else None
    sockets = [getattr(resources, name, None) for name in _SOCKETS]
    closed = threading.Event()

    def close(serving: bool) -> None:
        for socket in sockets:
            if socket is not None:
                (type(socket) if serving else socket_class).close(socket, linger=0)
        for task in tasks if serving else ():
            task.cancel()
        closed.set()

    if loop is None or loop.is_closed():
        close(serving=loop is None)
    else:
        with contextlib.suppress(RuntimeError):  # it was closed just now
            loop.call_soon_threadsafe(close, True)
        closed.wait(RELEASE_TIMEOUT)
    # On its own thread, which keeps the context from the collector as long as a socket is open.
    threading.Thread(target=context.term, name="vllm-context-end", daemon=True).start()


OUTPUT_QUEUE = Seam(
    "vllm.v1.engine.output_processor",
    "RequestOutputCollector.put",
    "ending one request with an error of its own",
    "it ends with the finish reason 'abort'",
)
REQUEST_STATES = Seam(
    "vllm.v1.engine.output_processor", "OutputProcessor.request_states", OUTPUT_QUEUE.used_for, OUTPUT_QUEUE.without
)


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
