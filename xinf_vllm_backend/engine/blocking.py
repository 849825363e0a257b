"""What vLLM's ``LLM``, whose methods block, gets for its engine: ours, which serves all threads at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import queue
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from ..errors import EngineStoppedError
from .supervisor import EngineSupervisor

LOOK = 1.0  # seconds between two looks at whether the event loop that outputs come from still runs
ASK = 60.0  # seconds for the engine to say what it can do

_requests: ContextVar[Requests] = ContextVar("requests of the call that runs on this thread")


class Requests:
    """The requests of one call of an ``LLM``, which runs on a thread of its own."""

    def __init__(self) -> None:
        self.unsent: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.running: dict[str, concurrent.futures.Future[Any]] = {}
        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancelled = False

    def cancel(self) -> None:
        """End them all; the call then raises CancelledError. From any thread."""
        self.cancelled = True
        for future in list(self.running.values()):
            future.cancel()


@contextlib.contextmanager
def calling(requests: Requests) -> Iterator[None]:
    """Have what an ``LLM`` asks for on this thread be ``requests``; none of them is left in the engine afterwards."""
    token = _requests.set(requests)
    try:
        yield
    finally:
        _requests.reset(token)
        requests.cancel()


class BlockingEngine:
    """The ``llm_engine`` of an ``LLM``; other attributes are those of the AsyncLLM.

    vLLM's own has one set of requests, and whoever steps gets the outputs of all. Here each call has its own.

    Args:
        engine: it is ready.
        loop: the event loop that its requests run on; not that of the calling thread.
    """

    def __init__(self, engine: EngineSupervisor, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._ids = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_engine"], name)

    def get_supported_tasks(self) -> tuple[str, ...]:
        asked = asyncio.run_coroutine_threadsafe(self._engine.llm.get_supported_tasks(), self._loop)
        return tuple(asked.result(ASK))

    def add_request(self, request_id: str, *args: Any, arrival_time: float | None = None, **kwargs: Any) -> str:
        _requests.get().unsent.append((request_id, args, kwargs))
        return request_id

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        requests = _requests.get()
        requests.unsent = [each for each in requests.unsent if each[0] not in request_ids]
        for request_id in request_ids:
            if request_id in requests.running:
                requests.running.pop(request_id).cancel()

    def get_num_unfinished_requests(self) -> int:
        requests = _requests.get()
        return len(requests.unsent) + len(requests.running)

    def has_unfinished_requests(self) -> bool:
        return self.get_num_unfinished_requests() > 0

    def step(self) -> list[Any]:
        """Wait for outputs of this call's requests, and return them.

        Raises:
            CancelledError: the call was cancelled.
            EngineStoppedError: the event loop has ended.
            Exception: what the engine raised for one of them.
        """
        requests = _requests.get()
        self._send(requests)
        outputs = []
        for request_id in self._done(requests):
            future = requests.running.pop(request_id, None)
            if future is None:  # aborted meanwhile
                continue
            output = future.result()
            output.request_id = request_id
            outputs.append(output)
        return outputs

    def _send(self, requests: Requests) -> None:
        """Send what was added, with one call of the event loop."""
        unsent, requests.unsent = requests.unsent, []
        if not unsent:
            return
        futures = {request_id: concurrent.futures.Future[Any]() for request_id, *_ in unsent}
        requests.running |= futures
        if requests.cancelled:
            requests.cancel()
            return
        self._loop.call_soon_threadsafe(self._begin, requests, unsent, futures)

    def _begin(
        self,
        requests: Requests,
        unsent: list[tuple[str, tuple[Any, ...], dict[str, Any]]],
        futures: Mapping[str, concurrent.futures.Future[Any]],
    ) -> None:
        for request_id, args, kwargs in unsent:
            task = self._loop.create_task(self._encode(*args, **kwargs))
            future = futures[request_id]
            task.add_done_callback(functools.partial(_copy, future))
            future.add_done_callback(functools.partial(self._ended, task, requests.done, request_id))

    def _ended(
        self,
        task: asyncio.Task[Any],
        done: queue.SimpleQueue[str],
        request_id: str,
        future: concurrent.futures.Future[Any],
    ) -> None:
        done.put(request_id)
        if future.cancelled() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.cancel)

    async def _encode(self, prompt: Any, params: Any, **kwargs: Any) -> Any:
        last = None
        async for output in self._engine.encode(prompt, params, f"blocking-{next(self._ids)}", **kwargs):
            last = output
        return last

    def _done(self, requests: Requests) -> list[str]:
        """Ids of those that are done; waits for one."""
        while True:
            if requests.cancelled:
                raise concurrent.futures.CancelledError
            with contextlib.suppress(queue.Empty):
                done = [requests.done.get(timeout=LOOK)]
                break
            if self._loop.is_closed():
                raise EngineStoppedError(f"The model {self._engine.name} was stopped while the request ran.")
        with contextlib.suppress(queue.Empty):
            while True:
                done.append(requests.done.get_nowait())
        return done


def _copy(future: concurrent.futures.Future[Any], task: asyncio.Task[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        if not task.cancelled():
            task.exception()  # nobody waits for it
    elif task.cancelled():
        future.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
