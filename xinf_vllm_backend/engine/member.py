"""One vLLM engine: started, watched, restarted in place when it dies or hangs, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from ..errors import BackendError, EngineDiedError, EngineRestartingError, EngineStaleError, EngineStoppedError
from ..settings import Settings
from . import arguments, vllm_seams
from .client import EngineClient
from .health import HangClock, Workload
from .incarnation import Incarnation, Phase
from .lifecycle import Lifecycle, Move, State
from .recovery import RestartBudget

__all__ = ["EngineMember", "Phase"]

logger = logging.getLogger("xinference.vllm_backend")

T = TypeVar("T")


class EngineMember:
    """One AsyncLLM and the engine behind it. Whatever is not its own it passes on to the AsyncLLM, once that is ready.

    Args:
        name: what to call the engine in threads, logs and errors.
        engine_args: a ``vllm.AsyncEngineArgs``.
        settings: the options of the model.
        on_phase: called, from several threads, with each phase of the first start.
        on_line: called, from several threads, with each line that the engine's processes print.
        environment: variables of this engine alone, such as its devices; for its processes, and for vLLM while it
            configures the engine here.
        on_move: called with each change of state, on the thread that made it.
        on_inexact: called with the id of each request that goes on after a death, but not exactly, and why.

    Attributes:
        lifecycle: its state and how it came there.
        restarts: how often the engine came back in place.
        failure: why it is not restarted any more; "" as long as it is.
    """

    def __init__(
        self,
        name: str,
        engine_args: Any,
        settings: Settings,
        on_phase: Callable[[Phase], None] = lambda phase: None,
        on_line: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] = MappingProxyType({}),
        on_move: Callable[[Move], None] = lambda move: None,
        on_inexact: Callable[[str, str], None] = lambda request_id, why: None,
    ) -> None:
        self.name = name
        self._engine_args = engine_args
        self._settings = settings
        self._on_phase = on_phase
        self._on_line = on_line
        self._environment = environment
        self._engine: Any = None
        self._client = EngineClient(name, settings, self._fail_request, on_inexact, self._refitted)
        self._incarnation: Incarnation | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._noticed = asyncio.Event()  # something ended
        self.lifecycle = Lifecycle(name, on_move)
        self.restarts = 0
        self.failure = ""

    def __getattr__(self, name: str) -> Any:
        engine = self.__dict__.get("_engine")
        if engine is None:
            raise AttributeError(f"{name!r}: the vLLM engine of {self.__dict__.get('name')} is not ready")
        return getattr(engine, name)

    # -- start

    def start(self, since: float | None = None) -> None:
        """Start the engine on a thread of its own and wait until it is ready, ``load_timeout`` seconds at most.

        Args:
            since: ``time.monotonic()`` from which the time counts; by default now.

        Raises:
            BadLaunchArgumentError: an engine argument is of the wrong type; nothing was started.
            EngineStartTimeoutError: it was not ready in time.
            EngineStoppedError: it was stopped while it started.
            EngineStartError: anything else, with the root cause.
        """
        begun = time.monotonic()
        arguments.check(self._engine_args)
        self.lifecycle.move(State.STARTING, "it was launched")
        incarnation = self._next_incarnation(self._on_phase)
        try:
            self._engine = incarnation.start(lambda: self._make_engine(incarnation), since)
        except BackendError as error:
            self.lifecycle.move(State.FAILED, str(error))
            raise
        self.lifecycle.move(State.READY, f"it was started in {time.monotonic() - begun:.1f} s")
        self._on_phase(Phase.READY)  # whoever hears of it may send requests

    def _next_incarnation(self, on_phase: Callable[[Phase], None]) -> Incarnation:
        with self._lock:
            if self.lifecycle.state in (State.STOPPING, State.STOPPED):
                raise EngineStoppedError(f"The launch of {self.name} was stopped.")
            self._incarnation = Incarnation(
                self.name, self._engine_args, self._settings, on_phase, self._on_line, self._environment, self._notice
            )
            return self._incarnation

    def _make_engine(self, incarnation: Incarnation) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        def stand_in(client: Any) -> EngineClient:
            incarnation.client = client
            self._client.attach(client)
            return self._client

        with vllm_seams.clients_become(stand_in):
            engine = AsyncLLM.from_engine_args(copy.deepcopy(self._engine_args))
        incarnation.client = incarnation.client or engine.engine_core
        return engine

    # -- watch

    async def watch(self) -> str:
        """Keep the engine alive; a task of the event loop that its requests come from, cancelled to end it.

        Returns:
            Why the engine is dead and is not restarted any more; "" if it was stopped.
        """
        self._loop = asyncio.get_running_loop()
        budget = RestartBudget(self._settings.max_restarts, self._settings.restart_refill)
        resuming: asyncio.Task[None] | None = None
        try:
            self._client.on_dead = self._noticed.set
            while self.lifecycle.state in (State.READY, State.STALE):
                budget.healthy()
                hung = await self._until_dead()
                if hung is None:
                    break
                self._client.lose()
                await vllm_seams.forget_inputs(self._engine)
                if resuming is not None:
                    await asyncio.wait([resuming])  # it has nothing to send to
                await self._bring_back(hung, budget)
                resuming = self._loop.create_task(self._resume())
            return self.failure
        except Exception as error:  # nobody else would bring the engine back
            logger.exception("The vLLM engine of %s cannot be watched", self.name)
            self._give_up(f"The vLLM engine of {self.name} can no longer be watched: {error!r}")
            return self.failure
        finally:
            self._client.on_dead = None
            if resuming is not None:
                resuming.cancel()

    async def _until_dead(self) -> str | None:
        """Return how the engine hangs, "" when it died, None when it was stopped."""
        interval = self._settings.health_interval
        incarnation = self._current
        hang = HangClock(self._settings.hang_timeout, interval)
        workload = Workload()
        asked: asyncio.Task[None] | None = None
        delivered = -1
        try:
            while not (incarnation.is_dead() or self._client.is_lost):
                flows, delivered = delivered != self._client.journal.outputs, self._client.journal.outputs
                answered = asked is not None and asked.done()
                halted = not flows and incarnation.is_halted()
                if flows or (answered and not halted):
                    hang.heard()
                elif hang.look(not halted and workload.works(*incarnation.seconds_of_cpu())):
                    silent = f"for {self._settings.hang_timeout:g} s it has given no sign of life and done no work"
                    return f"The vLLM engine of {self.name} hangs: {silent}"
                if asked is None or answered:
                    asked = None if flows else asyncio.ensure_future(vllm_seams.ask_sign_of_life(incarnation.client))
                self._client.fail_waiting(self._settings.recovery_timeout, self._waited)
                await self._notice_or(interval)
            return None if self.lifecycle.state in (State.STOPPING, State.STOPPED) else ""
        finally:
            if asked is not None:
                asked.cancel()

    async def _notice_or(self, timeout: float) -> None:
        noticed = asyncio.ensure_future(self._noticed.wait())
        try:
            await asyncio.wait([noticed], timeout=timeout)
        finally:
            noticed.cancel()
        self._noticed.clear()

    async def _bring_back(self, hung: str, budget: RestartBudget) -> None:
        """End what is left of the engine and start another, as often as the budget allows."""
        begun = time.monotonic()
        failures = [await self._meanwhile(asyncio.to_thread(self._current.end, hung))]
        while True:
            delay = budget.take() if self._client.is_attachable else None
            if delay is None:
                self._give_up(_story(failures))
                return
            self.lifecycle.move(State.RESTARTING, failures[0])
            await self._meanwhile(asyncio.sleep(delay))
            try:
                incarnation = await self._meanwhile(asyncio.to_thread(self._start_again))
            except EngineStoppedError:
                return
            except BackendError as error:
                logger.error("%s", error)
                failures.append(str(error))
            else:
                self._serve_again(incarnation, f"it was restarted in {time.monotonic() - begun:.1f} s")
                return

    def _start_again(self) -> Incarnation:
        self._current.stop(kill=True)  # none beside what is left of the last, which failed to end if this raises
        incarnation = self._next_incarnation(lambda phase: None)
        incarnation.client = incarnation.start(lambda: vllm_seams.make_client(copy.deepcopy(self._engine_args)))
        return incarnation

    def _serve_again(self, incarnation: Incarnation, how: str) -> None:
        self.restarts += 1
        self._client.attach(incarnation.client)
        if self._client.changed_weights:
            self.lifecycle.move(State.STALE, f"{how}, without the weights of {self._client.changed_weights}()")
            self._client.go_stale(EngineStaleError(self._stale()))
        else:
            count = len(self._client.journal)
            self.lifecycle.move(State.READY, f"{how}; {count} request{' goes' if count == 1 else 's go'} on")

    async def _resume(self) -> None:
        if self.lifecycle.state is State.READY:
            try:
                await self._client.resume()
            except Exception:  # nobody awaits this task for what it raised
                logger.exception("Requests of %s could not be sent to its restarted engine", self.name)

    def _refitted(self, method: str) -> None:
        self.lifecycle.move(State.READY, f"it got its weights by {method}()")

    def _stale(self) -> str:
        return (
            f"The vLLM engine of {self.name} died and was restarted, but the weights it had been given by "
            f"{self._client.changed_weights}() are gone; it serves again once it is given them."
        )

    async def _meanwhile(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``, and tell requests that have waited for too long."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=self._settings.health_interval)
                self._client.fail_waiting(self._settings.recovery_timeout, self._waited)
            return task.result()
        finally:
            task.cancel()

    def _waited(self, request_id: str) -> Exception:
        return EngineRestartingError(
            f"The request {request_id} waited for {self._settings.recovery_timeout:g} s for the vLLM engine of "
            f"{self.name}, which is being restarted; send it again later."
        )

    def _give_up(self, why: str) -> None:
        self.failure = why
        self.lifecycle.move(State.FAILED, why)
        self._client.close(EngineDiedError(f"{why}. Send the request again later."))

    def _fail_request(self, request_id: str, error: Exception) -> None:
        vllm_seams.fail_request(self._engine, request_id, error)

    def _notice(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._noticed.set)

    @property
    def _current(self) -> Incarnation:
        assert self._incarnation is not None, "it was never started"
        return self._incarnation

    def is_dead(self) -> bool:
        """Whether the engine is dead just now; False while it was never ready."""
        return self._incarnation is not None and self._incarnation.is_dead()

    def death(self) -> str:
        """How the engine died, in a sentence with the root cause where one is known; blocks for up to a second."""
        return self.failure or self._current.death()

    def processes(self) -> list[dict[str, Any]]:
        """The engine's living processes: pid and title of each."""
        return [] if self._incarnation is None else self._incarnation.processes()

    def requests(self) -> int:
        """How many requests are in flight, those that wait for a restart included."""
        return len(self._client.journal)

    # -- stop

    def stop(self, timeout: float) -> None:
        """Stop the engine in whatever state it is; idempotent. Blocks, so never call it on an event loop.

        Args:
            timeout: seconds for an orderly shutdown; what is left then is killed.

        Raises:
            BackendError: a process survived SIGKILL for 5 s.
        """
        with self._lock:
            self.lifecycle.move(State.STOPPING, "it was asked to")
        if self._loop is not None and not self._loop.is_closed():
            stopped = EngineStoppedError(f"The model {self.name} was stopped while the request ran; send it again.")
            self._loop.call_soon_threadsafe(self._client.close, stopped)
        if self._incarnation is not None:
            self._incarnation.stop(None if self._engine is None else self._engine.shutdown, timeout)
        self.lifecycle.move(State.STOPPED, "its processes are gone")


def _story(failures: list[str]) -> str:
    """What is said of several failures in a row."""
    first, last = failures[0], failures[-1]
    if len(failures) == 1:
        return first
    return f"{first}; it could not be restarted, in {len(failures) - 1} attempts, the last time because: {last}"
