"""One vLLM engine: started, watched, restarted in place when it dies or hangs, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import (
    BackendError,
    EngineDiedError,
    EnginePausedError,
    EngineRestartingError,
    EngineStaleError,
    EngineStartError,
    EngineStoppedError,
)
from . import arguments, preload, replay
from .client import EngineClient
from .death import Death, Ending, RequestInFlight
from .lifecycle import Lifecycle, State
from .pause import Control, Stage
from .phase import Phase
from .processes import EngineProcesses
from .recovery import RestartBudget
from .rendering import Rendering
from .rest import Rest
from .seams import core_client, platform, pooling, rendering, resuming
from .spec import EngineSpec
from .watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = "send the request again in a minute."


class EngineSupervisor:
    """One AsyncLLM and the engine behind it; other attributes are those of the AsyncLLM, once that is ready.

    Args:
        spec: what the engine is made from; its ``on_phase`` hears of the first start alone.

    Attributes:
        spec: as given.
        settings: those of ``spec``.
        client: the AsyncLLM's client of EngineCore.
        lifecycle: its state and how it came there.
        restarts: number of times the engine came back in place.
        failure: why it is no longer restarted, for operators; "" as long as it is.
        control: pauses it, and puts it to sleep.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.name = spec.name
        self.spec = spec
        self.settings = spec.settings
        self._engine: Any = None
        self._rendering: Rendering | None = None
        self.client = EngineClient(spec.name, spec.settings, self._fail_request, spec.on_inexact, self._refitted)
        self._processes: EngineProcesses | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: Watch | None = None
        self.lifecycle = Lifecycle(spec.name, spec.on_move)
        self.restarts = 0
        self.failure = ""
        self._rest = Rest(self)
        self.control = Control(self._rest, spec.settings.recovery_timeout)

    @property
    def llm(self) -> Any:
        """The AsyncLLM."""
        return self._engine

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
        arguments.check(self.spec.arguments)
        self.lifecycle.move(State.STARTING, "it was launched")
        try:
            self._engine = self._started(self.spec, self._make_engine, begun if since is None else since)
        except BackendError as error:
            self.lifecycle.move(State.FAILED, str(error))
            raise
        self._rendering = Rendering(self._engine) if rendering.present() else None
        self.lifecycle.move(State.READY, f"it was started in {time.monotonic() - begun:.1f} s")
        self.spec.on_phase(Phase.READY)

    def _started(self, spec: EngineSpec, make: Callable[[EngineProcesses], Any], since: float) -> Any:
        """What ``make`` returns; where the fork may be why it failed, it is called again with spawned processes."""
        processes = self._next_processes(spec)
        try:
            return processes.start(lambda: make(processes), since)
        except EngineStartError as error:
            if not processes.may_be_the_fork:
                raise
            preload.give_up_zygote(str(error))
        return self._started(spec, make, since)

    def _next_processes(self, spec: EngineSpec) -> EngineProcesses:
        with self._lock:
            if self.lifecycle.state in (State.STOPPING, State.STOPPED):
                raise EngineStoppedError(f"The launch of {self.name} was stopped.")
            self._processes = EngineProcesses(spec, self._notice)
            return self._processes

    def _make_engine(self, processes: EngineProcesses) -> Any:
        def stand_in(client: Any) -> EngineClient:
            processes.client = client
            self.client.attach(client)
            return self.client

        with core_client.client_replaced_by(stand_in):
            engine = core_client.make_async_llm(self.spec.arguments)
        processes.client = processes.client or core_client.client_of(engine)
        return engine

    # -- requests

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """AsyncLLM's, noted where the stream is to outlive this process; see :mod:`.replay`.

        Raises:
            EnginePausedError: it is paused, and requests are not to wait.
        """
        self.client.admission.check()
        outputs: AsyncIterator[Any] = self.__getattr__("generate")(prompt, sampling_params, *args, **kwargs)
        record = replay.current()
        if record is None:
            return outputs
        record.changed_weights = self.client.changed_weights
        return record.tap(outputs, sampling_params)

    async def encode(self, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """AsyncLLM's; texts that come together are tokenized together.

        Raises:
            EnginePausedError: it is paused, and requests are not to wait; or a pause ended this one.
        """
        self.client.admission.check()
        if self._rendering is not None and not kwargs.get("tokenization_kwargs"):
            prompt = await self._rendering.rendered(prompt)
        async for output in self.__getattr__("encode")(prompt, *args, **kwargs):
            if pooling.was_aborted(output):
                raise EnginePausedError(f"The request was ended by an order to pause {self.name}; {_AGAIN}")
            yield output

    # -- watch

    async def watch(self) -> str:
        """Keep the engine alive; a task of the event loop that its requests come from, cancelled to end it.

        Returns:
            Why the engine is dead and is no longer restarted; "" if it was stopped.
        """
        self._loop = asyncio.get_running_loop()
        budget = RestartBudget(self.settings.max_restarts, self.settings.restart_refill)
        resend: asyncio.Task[None] | None = None
        try:
            self.client.on_dead = self.notice
            while self.lifecycle.state in (State.READY, State.STALE):
                budget.healthy()
                ending = await self._until_end()
                if ending is Ending.STOPPED or self.failure:
                    break
                if ending is Ending.ASLEEP:
                    await _end(resend)
                    await self._rest.until_awake(budget)
                    resend = self._loop.create_task(self.resume())
                    continue
                in_flight = self.client.in_flight()
                self.client.lose()
                await _end(resend)  # there is nothing to send to
                await resuming.clear_multimodal_cache(self._engine)
                await self.bring_back(await self._bury(ending, in_flight), budget)
                resend = self._loop.create_task(self.resume())
            return self.failure
        except Exception as error:  # nothing else would bring the engine back
            logger.exception("The vLLM engine of %s cannot be watched", self.name)
            self._give_up(f"The vLLM engine of {self.name} can no longer be watched: {error!r}")
            return self.failure
        finally:
            self.client.on_dead = None
            if resend is not None:
                resend.cancel()
            self._rest.close()

    async def _until_end(self) -> Ending:
        step_timeout = platform.step_timeout() if self.spec.ranks_elsewhere else 0.0
        self._watch = Watch(self.current, self.client, self.settings, self._look, step_timeout)
        ending = await self._watch.until_end()
        if self.lifecycle.state in (State.STOPPING, State.STOPPED):
            return Ending.STOPPED
        if self._rest.restart_wanted:
            return Ending.HUNG
        return Ending.ASLEEP if self._rest.is_ordered else ending

    def _look(self) -> bool:
        """Look at what is in this process: requests that wait, and AsyncLLM's own task; whether it can go on."""
        self.client.fail_waiting(self.settings.recovery_timeout, self._waited)
        error = core_client.output_task_error(self._engine)
        if error is not None and self.lifecycle.state not in (State.STOPPING, State.STOPPED):
            self._give_up(f"The task that reads the outputs of the vLLM engine of {self.name} ended: {error!r}")
        self._rest.look(self.control.stage is Stage.SERVING)
        return not (self.failure or self._rest.restart_wanted or self._rest.is_ordered)

    async def _bury(self, ending: Ending, in_flight: tuple[RequestInFlight, ...]) -> Death:
        """End what is left of the engine, and find out how it died."""
        silent, who = (0.0, ()) if self._watch is None else (self._watch.limit, self._watch.silent)
        death = await self.meanwhile(asyncio.to_thread(self.current.end, ending, silent, who))
        death = replace(death, requests=in_flight, reason=self._rest.restart_wanted or death.reason)
        self._rest.restart_wanted = ""
        if death.hung:
            logger.error("%s", death.explained())
        return death

    async def bring_back(self, death: Death, budget: RestartBudget) -> None:
        """Start another engine, as often as the budget allows."""
        begun = time.monotonic()
        failures = [death.reason]
        while True:
            delay = budget.take() if self.client.is_attachable else None
            if why := await self.meanwhile(asyncio.to_thread(self.why_not_again)):
                failures, delay = [f"{failures[0]}; it is not restarted in place: {why}"], None
            if delay is None:
                self._give_up(_story(failures), death if len(failures) == 1 else None)
                return
            self.lifecycle.move(State.RESTARTING, death.reason, death)
            await self.meanwhile(asyncio.sleep(delay))
            try:
                processes = await self.meanwhile(asyncio.to_thread(self.start_again))
            except EngineStoppedError:
                return
            except BackendError as error:
                logger.error("%s", error)
                failures.append(str(error))
            else:
                self.restarts += 1
                self.serve_again(processes, f"it was restarted in {time.monotonic() - begun:.1f} s")
                return

    def why_not_again(self) -> str:
        """Why it cannot be started again in place, a sentence; "" if it can."""
        return self.spec.one_start or self.spec.why_not_again()

    def start_again(self) -> EngineProcesses:
        if why := self.why_not_again():
            raise EngineStartError(f"The vLLM engine of {self.name} cannot be started again: {why}")
        self.current.stop(kill=True)  # raises if a process of the last engine is left; then none is started
        spec = replace(self.spec, on_phase=lambda phase: None)
        client = self._started(spec, lambda _: core_client.make_client(self.spec.arguments), time.monotonic())
        self.current.client = client
        return self.current

    def serve_again(self, processes: EngineProcesses, how: str) -> None:
        self.client.attach(processes.client)
        if self.client.changed_weights:
            self.lifecycle.move(State.STALE, f"{how}, without the weights of {self.client.changed_weights}()")
            self.client.go_stale(EngineStaleError(self._stale()))
        else:
            count = len(self.client.journal)
            self.lifecycle.move(State.READY, f"{how}; {count} request{' goes' if count == 1 else 's go'} on")

    async def resume(self) -> None:
        if self.lifecycle.state is State.READY:
            try:
                await self.client.resume()
            except Exception:  # nobody awaits this task for what it raised
                logger.exception("Requests of %s could not be sent to its restarted engine", self.name)

    def _refitted(self, method: str) -> None:
        self.lifecycle.move(State.READY, f"it got its weights by {method}()")

    def _stale(self) -> str:
        return (
            f"The vLLM engine of {self.name} died and was restarted, but the weights it had been given by "
            f"{self.client.changed_weights}() are gone; it serves again once it is given them."
        )

    async def meanwhile(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``, and tell requests that have waited for too long."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=self.settings.health_interval)
                self.client.fail_waiting(self.settings.recovery_timeout, self._waited)
            return task.result()
        finally:
            task.cancel()

    def _waited(self, request_id: str) -> Exception:
        return EngineRestartingError(
            f"The request {request_id} waited too long for the vLLM engine of {self.name}, which is being restarted; "
            "send it again later."
        )

    def _give_up(self, why: str, death: Death | None = None) -> None:
        self.failure = why
        self.lifecycle.move(State.FAILED, why, death)
        # For clients, so without the cause, which may quote the engine's output.
        self.client.close(EngineDiedError(f"The vLLM engine of {self.name} died; its model is started again: {_AGAIN}"))

    def _fail_request(self, request_id: str, error: Exception) -> None:
        core_client.fail_request(self._engine, request_id, error)

    def _notice(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.notice)

    def notice(self) -> None:
        if self._watch is not None:
            self._watch.notice()

    @property
    def current(self) -> EngineProcesses:
        assert self._processes is not None, "it was never started"
        return self._processes

    def end_engine(self, reason: str) -> None:
        """End the engine, as when it is found dead; on the event loop."""
        self._rest.restart(reason)

    def is_dead(self) -> bool:
        """Whether the engine is dead just now; False while it was never ready, or sleeps."""
        return self._processes is not None and not self._rest.is_ordered and self._processes.is_dead()

    def death(self) -> str:
        """How the engine died, in a sentence with the root cause where one is known; blocks for up to a second."""
        return self.failure or self.current.death()

    def processes(self) -> list[dict[str, Any]]:
        """The engine's living processes: pid and title of each."""
        return [] if self._processes is None else self._processes.processes()

    def requests(self) -> int:
        """How many requests are in flight, those that wait for a restart included."""
        return len(self.client.journal)

    # -- stop

    def stop(self, timeout: float) -> None:
        """Stop the engine in whatever state it is; idempotent. Blocks, so never call it on an event loop.

        Args:
            timeout: seconds for an orderly shutdown; what is left then is killed.

        Raises:
            BackendError: a process survived SIGKILL for 20 s.
        """
        with self._lock:
            self.lifecycle.move(State.STOPPING, "it was asked to")
        if self._loop is not None and not self._loop.is_closed():
            stopped = EngineStoppedError(f"The model {self.name} was stopped while the request ran; send it again.")
            self._loop.call_soon_threadsafe(self.client.close, stopped)
        if self._processes is not None:
            self._processes.stop(None if self._engine is None else self._engine.shutdown, timeout)
        self.lifecycle.move(State.STOPPED, "its processes are gone")


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def _story(failures: list[str]) -> str:
    """What is said of several failures in a row."""
    first, last = failures[0], failures[-1]
    if len(failures) == 1:
        return first
    return f"{first}; it could not be restarted, in {len(failures) - 1} attempts, the last time because: {last}"
