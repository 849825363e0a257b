"""One vLLM engine: started, watched, restarted in place when it dies or hangs, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import (
    BackendError,
    EngineDiedError,
    EngineRestartingError,
    EngineStaleError,
    EngineStartError,
    EngineStoppedError,
)
from . import arguments, preload, replay
from .admission import Admission, Lets
from .client import EngineClient
from .death import Death, Ending, RequestInFlight
from .journal import Entry
from .lifecycle import Lifecycle, State
from .pause import Control, Order, Stage
from .phase import Phase
from .processes import EngineProcesses
from .recovery import RestartBudget
from .seams import core_client, platform, resuming
from .sleep import Sleep
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
        lifecycle: its state and how it came there.
        restarts: number of times the engine came back in place.
        failure: why it is no longer restarted, for operators; "" as long as it is.
        control: pauses it, and puts it to sleep.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._settings = spec.settings
        self._engine: Any = None
        self._client = EngineClient(spec.name, spec.settings, self._fail_request, spec.on_inexact, self._refitted)
        self._processes: EngineProcesses | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: Watch | None = None
        self.lifecycle = Lifecycle(spec.name, spec.on_move)
        self.restarts = 0
        self.failure = ""
        self.control = Control(self, spec.settings.recovery_timeout)
        self._client.on_wanted = self._wanted
        self._sleep: Sleep | None = None  # from the order until it is awake again
        self._forced = ""  # why it is to be restarted though it lives
        self._sending: asyncio.Task[None] | None = None  # what a pause had held

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
        arguments.check(self._spec.arguments)
        self.lifecycle.move(State.STARTING, "it was launched")
        try:
            self._engine = self._started(self._spec, self._make_engine, begun if since is None else since)
        except BackendError as error:
            self.lifecycle.move(State.FAILED, str(error))
            raise
        self.lifecycle.move(State.READY, f"it was started in {time.monotonic() - begun:.1f} s")
        self._spec.on_phase(Phase.READY)

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
            self._client.attach(client)
            return self._client

        with core_client.client_replaced_by(stand_in):
            engine = core_client.make_async_llm(self._spec.arguments)
        processes.client = processes.client or core_client.client_of(engine)
        return engine

    # -- requests

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """AsyncLLM's, noted where the stream is to outlive this process; see :mod:`.replay`."""
        outputs: AsyncIterator[Any] = self.__getattr__("generate")(prompt, sampling_params, *args, **kwargs)
        record = replay.current()
        if record is None:
            return outputs
        record.changed_weights = self._client.changed_weights
        return record.tap(outputs, sampling_params)

    # -- watch

    async def watch(self) -> str:
        """Keep the engine alive; a task of the event loop that its requests come from, cancelled to end it.

        Returns:
            Why the engine is dead and is no longer restarted; "" if it was stopped.
        """
        self._loop = asyncio.get_running_loop()
        budget = RestartBudget(self._settings.max_restarts, self._settings.restart_refill)
        resend: asyncio.Task[None] | None = None
        try:
            self._client.on_dead = self._notice_here
            while self.lifecycle.state in (State.READY, State.STALE):
                budget.healthy()
                ending = await self._until_end()
                if ending is Ending.STOPPED or self.failure:
                    break
                if ending is Ending.ASLEEP:
                    await _end(resend)
                    await self._rest(budget)
                    resend = self._loop.create_task(self._resume())
                    continue
                in_flight = self._client.in_flight()
                self._client.lose()
                await _end(resend)  # there is nothing to send to
                await resuming.clear_multimodal_cache(self._engine)
                await self._bring_back(await self._bury(ending, in_flight), budget)
                resend = self._loop.create_task(self._resume())
            return self.failure
        except Exception as error:  # nothing else would bring the engine back
            logger.exception("The vLLM engine of %s cannot be watched", self.name)
            self._give_up(f"The vLLM engine of {self.name} can no longer be watched: {error!r}")
            return self.failure
        finally:
            self._client.on_dead = None
            for task in (resend, self._sending):
                if task is not None:
                    task.cancel()
            if self._sleep is not None:
                self._sleep.end(EngineStoppedError(f"The model {self.name} was stopped."))

    async def _until_end(self) -> Ending:
        self._watch = Watch(self._current, self._client, self._settings, self._look)
        ending = await self._watch.until_end()
        if self.lifecycle.state in (State.STOPPING, State.STOPPED):
            return Ending.STOPPED
        if self._forced:
            return Ending.HUNG
        return Ending.ASLEEP if self._sleep is not None else ending

    def _look(self) -> bool:
        """Look at what is in this process: requests that wait, and AsyncLLM's own task; whether it can go on."""
        self._client.fail_waiting(self._settings.recovery_timeout, self._waited)
        error = core_client.output_task_error(self._engine)
        if error is not None and self.lifecycle.state not in (State.STOPPING, State.STOPPED):
            self._give_up(f"The task that reads the outputs of the vLLM engine of {self.name} ended: {error!r}")
        if self._is_idle():
            self._order_sleep(None, f"no request has used it for {self._settings.idle_sleep_after:g} s", True)
        return not (self.failure or self._forced or self._sleep is not None)

    async def _bury(self, ending: Ending, in_flight: tuple[RequestInFlight, ...]) -> Death:
        """End what is left of the engine, and find out how it died."""
        silent = 0.0 if self._watch is None else self._watch.limit
        death = await self._meanwhile(asyncio.to_thread(self._current.end, ending, silent))
        death = replace(death, requests=in_flight, reason=self._forced or death.reason)
        self._forced = ""
        if death.hung:
            logger.error("%s", death.explained())
        return death

    async def _bring_back(self, death: Death, budget: RestartBudget) -> None:
        """Start another engine, as often as the budget allows."""
        begun = time.monotonic()
        failures = [death.reason]
        while True:
            delay = budget.take() if self._client.is_attachable else None
            if delay is None:
                self._give_up(_story(failures), death if len(failures) == 1 else None)
                return
            self.lifecycle.move(State.RESTARTING, death.reason, death)
            await self._meanwhile(asyncio.sleep(delay))
            try:
                processes = await self._meanwhile(asyncio.to_thread(self._start_again))
            except EngineStoppedError:
                return
            except BackendError as error:
                logger.error("%s", error)
                failures.append(str(error))
            else:
                self.restarts += 1
                self._serve_again(processes, f"it was restarted in {time.monotonic() - begun:.1f} s")
                return

    def _start_again(self) -> EngineProcesses:
        self._current.stop(kill=True)  # raises if a process of the last engine is left; then none is started
        spec = replace(self._spec, on_phase=lambda phase: None)
        client = self._started(spec, lambda _: core_client.make_client(self._spec.arguments), time.monotonic())
        self._current.client = client
        return self._current

    def _serve_again(self, processes: EngineProcesses, how: str) -> None:
        self._client.attach(processes.client)
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
            f"The request {request_id} waited too long for the vLLM engine of {self.name}, which is being restarted; "
            "send it again later."
        )

    def _give_up(self, why: str, death: Death | None = None) -> None:
        self.failure = why
        self.lifecycle.move(State.FAILED, why, death)
        # For clients, so without the cause, which may quote the engine's output.
        self._client.close(
            EngineDiedError(f"The vLLM engine of {self.name} died; its model is started again: {_AGAIN}")
        )

    def _fail_request(self, request_id: str, error: Exception) -> None:
        core_client.fail_request(self._engine, request_id, error)

    def _notice(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._notice_here)

    def _notice_here(self) -> None:
        if self._watch is not None:
            self._watch.notice()

    @property
    def _current(self) -> EngineProcesses:
        assert self._processes is not None, "it was never started"
        return self._processes

    def is_dead(self) -> bool:
        """Whether the engine is dead just now; False while it was never ready, or sleeps."""
        return self._processes is not None and self._sleep is None and self._processes.is_dead()

    def death(self) -> str:
        """How the engine died, in a sentence with the root cause where one is known; blocks for up to a second."""
        return self.failure or self._current.death()

    def processes(self) -> list[dict[str, Any]]:
        """The engine's living processes: pid and title of each."""
        return [] if self._processes is None else self._processes.processes()

    def requests(self) -> int:
        """How many requests are in flight, those that wait for a restart included."""
        return len(self._client.journal)

    # -- sleep

    def _is_idle(self) -> bool:
        """Whether it is to sleep because nobody uses it."""
        after = self._settings.idle_sleep_after
        keeps_weights = self._has_sleep_mode() or not self._client.changed_weights
        return bool(
            after
            and self._sleep is None
            and self.lifecycle.state is State.READY
            and self.control.stage is Stage.SERVING
            and keeps_weights
            and self._client.idle() >= after
        )

    def _has_sleep_mode(self) -> bool:
        """Whether vLLM can put it to sleep, and not only end it."""
        return bool(getattr(self._spec.arguments, "enable_sleep_mode", False)) and not platform.is_cpu_build()

    def _order_sleep(self, level: int | None, reason: str, is_idle: bool) -> Sleep:
        if level is None and self._has_sleep_mode():
            level = 1
        self._sleep = Sleep(level, reason, is_idle)
        self._client.doze()
        self._notice_here()
        return self._sleep

    def _wanted(self) -> bool:
        """A request needs it; whether that wakes it."""
        if self._sleep is None or not self._sleep.is_idle:
            return False
        self._sleep.woken.set()
        return True

    async def _rest(self, budget: RestartBudget) -> None:
        """Sleep until it is woken, and serve again; a task of its own cannot lose it."""
        sleep = self._sleep
        assert sleep is not None
        lives = await self._fall_asleep(sleep)
        self.lifecycle.move(State.ASLEEP, sleep.reason)
        sleep.has_begun()
        while not sleep.woken.is_set() and self.lifecycle.state is State.ASLEEP:
            await self._meanwhile(sleep.until_woken(self._settings.health_interval))
            if lives and self._current.is_dead():  # it is not missed before it is woken
                lives = await self._end_processes()
        if self.lifecycle.move(State.WAKING, "it is wanted" if sleep.is_idle else "it was asked to"):
            sleep.is_waking = True
            await self._wake(sleep, lives, budget)
        self._sleep = None
        self._client.rouse()
        sleep.end(None if not self.failure else EngineDiedError(self.failure))

    async def _fall_asleep(self, sleep: Sleep) -> bool:
        """Whether its processes live on."""
        if sleep.level is not None and not self._current.is_dead():
            try:
                await self._meanwhile(self._within_call_timeout(self._engine.sleep(level=sleep.level, mode="keep")))
                return True
            except (BackendError, asyncio.TimeoutError) as error:
                logger.error("The vLLM engine of %s cannot sleep, so it is ended: %r", self.name, error)
        return await self._end_processes()

    async def _within_call_timeout(self, call: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wait_for(call, self._settings.call_timeout)

    async def _end_processes(self) -> bool:
        """End them, and keep what is in flight; False: they live no more."""
        self._client.suspend()
        processes = self._current
        try:
            shut_down = functools.partial(processes.client.shutdown, timeout=self._settings.stop_timeout)
            await self._meanwhile(asyncio.to_thread(processes.stop, shut_down, self._settings.stop_timeout))
        except BackendError as error:
            logger.error("%s", error)
        await resuming.clear_multimodal_cache(self._engine)
        return False

    async def _wake(self, sleep: Sleep, lives: bool, budget: RestartBudget) -> None:
        begun = time.monotonic()
        if lives and await self._wake_up(sleep):
            self.lifecycle.move(State.READY, f"it was woken in {time.monotonic() - begun:.1f} s")
            return
        try:
            processes = await self._meanwhile(asyncio.to_thread(self._start_again))
        except EngineStoppedError:
            return
        except BackendError as error:
            await self._bring_back(Death(str(error)), budget)
        else:
            self._serve_again(processes, f"it was woken in {time.monotonic() - begun:.1f} s")

    async def _wake_up(self, sleep: Sleep) -> bool:
        """Wake an engine that vLLM put to sleep; False if it has to be started again."""
        try:
            await self._meanwhile(self._within_call_timeout(self._engine.wake_up()))
            if sleep.level == 2:  # which keeps no weights
                await self._meanwhile(self._within_call_timeout(self._engine.collective_rpc("reload_weights")))
            return True
        except (BackendError, asyncio.TimeoutError) as error:
            logger.error("The vLLM engine of %s cannot be woken, so it is started again: %r", self.name, error)
        await self._end_processes()
        return False

    # -- what Control tells it

    @property
    def admission(self) -> Admission:
        return self._client.admission

    def why_not(self, order: Order) -> str | None:
        """Why ``order`` cannot be carried out, in words behind the engine's name; None if it can."""
        state = self.lifecycle.state
        if state not in (State.READY, State.RESTARTING, State.STALE, State.ASLEEP, State.WAKING):
            return f"is {state.value}; try again when it is ready"
        if order.action != "sleep":
            return None
        if order.level is not None and not self._has_sleep_mode():
            return "was not launched with enable_sleep_mode on a GPU; leave level out, and its processes are ended"
        if self._client.changed_weights and not self._has_sleep_mode():
            return f"would lose the weights of {self._client.changed_weights}(); launch it with enable_sleep_mode"
        return None

    async def drained(self) -> None:
        """Return when no request is in flight but those that the gate holds."""
        await self._client.journal.until_closed(self._begun())

    def _begun(self) -> list[Entry]:
        return [entry for entry in self._client.journal if not entry.held]

    async def freeze(self, mode: str, clear_cache: bool) -> None:
        """End what is in flight ("abort") or keep it ("keep"), and return when the engine does not step any more.

        Raises:
            EngineRestartingError: no engine served within ``recovery_timeout``.
        """
        if mode == "abort":
            await core_client.abort(self._engine, [entry.id for entry in self._begun()])
        while self._sleep is None:
            try:
                await self._engine.pause_generation(mode=mode, clear_cache=clear_cache)
                return
            except EngineDiedError:  # the next one is asked
                continue

    async def thaw(self) -> None:
        """Have the engine step again; one that was started since is not paused."""
        if not self._client.is_lost:
            with contextlib.suppress(EngineDiedError):
                await self._engine.resume_generation()

    async def fall_asleep(self, level: int | None) -> None:
        """Sleep until :meth:`wake`, even if it is wanted."""
        while self._sleep is not None and self._sleep.is_waking:
            await self._sleep.awake()
        sleep = self._sleep or self._order_sleep(level, "it was asked to", False)
        sleep.is_idle = False
        sleep.woken.clear()
        await sleep.asleep()

    async def wake(self) -> None:
        """Return when it is awake.

        Raises:
            EngineDiedError: it could not be woken.
        """
        if self._sleep is not None:
            self._sleep.woken.set()
            await self._sleep.awake()

    def go_on(self) -> None:
        """Open the gate, and send what it held."""
        self.admission.lets = Lets.ALL
        self._client.journal.release()
        self._sending = asyncio.ensure_future(self._client.go_on())

    def restart(self, reason: str) -> None:
        """End its processes and start others; requests go on."""
        if self.lifecycle.state is State.READY:
            self._forced = f"The vLLM engine of {self.name} is ended: {reason}"
            self._notice_here()

    def in_flight(self) -> tuple[int, int]:
        """Number of requests in flight, and of those among them that wait."""
        return len(self._client.journal), len(self._client.journal.waiting())

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
            self._loop.call_soon_threadsafe(self._client.close, stopped)
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
