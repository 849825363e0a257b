"""An engine that rests: paused, or asleep because somebody ordered it or because nobody uses it.

It sleeps by vLLM's sleep mode where it was launched with that, and else without processes: then all memory that they
had is free, and waking is a restart without a death. The watch over the engine calls :meth:`Rest.until_awake`, so that
nothing else starts or ends its processes meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from ..errors import BackendError, EngineDiedError, EngineStoppedError
from ..settings import Settings
from .admission import Admission, Lets
from .client import EngineClient
from .death import Death
from .journal import Entry
from .lifecycle import Lifecycle, State
from .pause import Order
from .processes import EngineProcesses
from .recovery import RestartBudget
from .seams import core_client, platform, resuming
from .spec import EngineSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Engine(Protocol):
    """The engine that rests; see :class:`.supervisor.EngineSupervisor`."""

    name: str
    spec: EngineSpec
    settings: Settings
    client: EngineClient
    lifecycle: Lifecycle
    failure: str

    @property
    def llm(self) -> Any: ...

    @property
    def current(self) -> EngineProcesses: ...

    def notice(self) -> None: ...

    async def meanwhile(self, work: Coroutine[Any, Any, T]) -> T: ...

    async def bring_back(self, death: Death, budget: RestartBudget) -> None: ...

    def start_again(self) -> EngineProcesses: ...

    def serve_again(self, processes: EngineProcesses, how: str) -> None: ...


class Sleep:
    """One sleep, from the order until the engine is awake again; all of it belongs to one event loop.

    Args:
        level: of vLLM's sleep; None: the engine's processes end.
        reason: a sentence.
        is_idle: whether a request wakes it.

    Attributes:
        woken: set when it is to end.
        is_waking: whether it is ending.
    """

    def __init__(self, level: int | None, reason: str, is_idle: bool) -> None:
        self.level = level
        self.reason = reason
        self.is_idle = is_idle
        self.woken = asyncio.Event()
        self.is_waking = False
        loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()

    def begin(self) -> None:
        self._begun.set_result(None)

    async def begun(self) -> None:
        await asyncio.shield(self._begun)

    async def until_woken(self, timeout: float) -> None:
        """Return when it is to end, or after ``timeout`` seconds."""
        woken = asyncio.ensure_future(self.woken.wait())
        await asyncio.wait({woken}, timeout=timeout)
        woken.cancel()

    def end(self, error: BackendError | None = None) -> None:
        """The engine is awake, or with ``error`` will never be; idempotent."""
        for future in (self._begun, self._ended):
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                future.exception()  # nobody may wait for it

    async def ended(self) -> None:
        """Return when the engine is awake.

        Raises:
            BackendError: it could not be woken.
        """
        await asyncio.shield(self._ended)


class Rest:
    """The rest of one engine: what :class:`.pause.Control` tells it, and when it sleeps by itself.

    Args:
        engine: whose it is.

    Attributes:
        restart_wanted: why the engine is to be ended and started again though it lives; "" if it is not.
    """

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.restart_wanted = ""
        self._engine = engine
        self._client = engine.client
        self._client.on_wanted = self._wanted
        self._sleep: Sleep | None = None
        self._sending: asyncio.Task[None] | None = None  # what a pause held
        self._frozen = False  # it was told to pause, or may have been

    @property
    def is_ordered(self) -> bool:
        """Whether it sleeps, or is to."""
        return self._sleep is not None

    def look(self, serves: bool) -> None:
        """Have it sleep if it has been idle for long.

        Args:
            serves: whether nobody told it to do anything else.
        """
        after = self._engine.settings.idle_sleep_after
        if not (after and serves) or self._sleep is not None or self._engine.lifecycle.state is not State.READY:
            return
        if not (self._client.is_attachable and self._can_sleep() and self._keeps_weights()):
            return
        if self._client.idle() >= after:
            self._order(None, f"no request has used it for {after:g} s", is_idle=True)

    def close(self) -> None:
        """The engine is no longer watched; nobody waits for it any more."""
        if self._sending is not None:
            self._sending.cancel()
        if self._sleep is not None:
            self._sleep.end(EngineStoppedError(f"The model {self.name} was stopped."))

    # -- sleep

    def _has_sleep_mode(self) -> bool:
        """Whether vLLM can put it to sleep; on CPUs that does nothing."""
        return bool(getattr(self._engine.spec.arguments, "enable_sleep_mode", False)) and not platform.is_cpu_build()

    def _can_sleep(self) -> bool:
        """Whether it can be woken: by vLLM, or because its processes can be started again."""
        return self._has_sleep_mode() or not self._engine.spec.one_start

    def _keeps_weights(self) -> bool:
        """Whether it has the same weights when it is awake again."""
        return self._has_sleep_mode() or not self._client.changed_weights

    def _order(self, level: int | None, reason: str, is_idle: bool) -> Sleep:
        if level is None and self._has_sleep_mode():
            level = 1
        self._sleep = Sleep(level, reason, is_idle)
        self._client.doze()
        self._engine.notice()
        return self._sleep

    def _wanted(self) -> bool:
        """It is needed; whether that wakes it."""
        if self._sleep is None or not self._sleep.is_idle:
            return False
        self._sleep.woken.set()
        return True

    async def until_awake(self, budget: RestartBudget) -> None:
        """Sleep, and return when it is awake again or is to serve no more; requests wait."""
        sleep = self._sleep
        assert sleep is not None, "it was not ordered"
        lives = await self._begin(sleep)
        self._engine.lifecycle.move(State.ASLEEP, sleep.reason)
        sleep.begin()
        while not sleep.woken.is_set() and self._engine.lifecycle.state is State.ASLEEP:
            await self._engine.meanwhile(sleep.until_woken(self._engine.settings.health_interval))
            if lives and self._engine.current.is_dead():  # nobody misses it before it is woken
                lives = await self._end_processes()
        if self._engine.lifecycle.move(State.WAKING, "it is wanted" if sleep.is_idle else "it was asked to"):
            sleep.is_waking = True
            await self._end(sleep, lives, budget)
        self._sleep = None
        self._client.rouse()
        failed = EngineDiedError(f"The vLLM engine of {self.name} could not be woken.")
        sleep.end(failed if self._engine.failure else None)

    async def _begin(self, sleep: Sleep) -> bool:
        """Whether its processes live on."""
        if sleep.level is not None and not self._engine.current.is_dead():
            try:
                await self._call(core_client.put_to_sleep(self._engine.llm, sleep.level))
                return True
            except (BackendError, asyncio.TimeoutError) as error:
                logger.error("The vLLM engine of %s cannot sleep, so it is ended: %r", self.name, error)
        return await self._end_processes()

    async def _end_processes(self) -> bool:
        """End them, and keep what is in flight; False: they live no more."""
        self._client.suspend()
        processes, timeout = self._engine.current, self._engine.settings.stop_timeout
        shut_down = functools.partial(processes.client.shutdown, timeout=timeout)
        try:
            await self._engine.meanwhile(asyncio.to_thread(processes.stop, shut_down, timeout))
        except BackendError as error:  # another is not started before they are gone
            logger.error("%s", error)
        await resuming.clear_multimodal_cache(self._engine.llm)
        return False

    async def _end(self, sleep: Sleep, lives: bool, budget: RestartBudget) -> None:
        begun = time.monotonic()
        if lives and await self._wake_up(sleep):
            self._engine.lifecycle.move(State.READY, f"it was woken in {time.monotonic() - begun:.1f} s")
            return
        try:
            processes = await self._engine.meanwhile(asyncio.to_thread(self._engine.start_again))
        except EngineStoppedError:
            return
        except BackendError as error:
            await self._engine.bring_back(Death(str(error)), budget)
        else:
            self._engine.serve_again(processes, f"it was woken in {time.monotonic() - begun:.1f} s")

    async def _wake_up(self, sleep: Sleep) -> bool:
        """Wake one that vLLM put to sleep; False if it has to be started again."""
        try:
            await self._call(core_client.awaken(self._engine.llm, sleep.level or 0))
            return True
        except (BackendError, asyncio.TimeoutError) as error:
            logger.error("The vLLM engine of %s cannot be woken, so it is started again: %r", self.name, error)
        return await self._end_processes()

    async def _call(self, call: Coroutine[Any, Any, Any]) -> None:
        await self._engine.meanwhile(asyncio.wait_for(call, self._engine.settings.call_timeout))

    # -- what Control tells it

    @property
    def admission(self) -> Admission:
        return self._client.admission

    def why_not(self, order: Order) -> str | None:
        """Why ``order`` cannot be carried out, in words behind the engine's name; None if it can."""
        state = self._engine.lifecycle.state
        if state not in (State.READY, State.RESTARTING, State.STALE, State.ASLEEP, State.WAKING):
            return f"is {state.value}; try again when it is ready"
        if not self._client.is_attachable:
            return f"cannot be paused: vLLM has no {core_client.CLIENT.name}"
        if order.action == "sleep" and state is State.STALE:
            return "serves no requests until it is given its weights again"
        if order.action == "sleep" and order.level is not None and not self._has_sleep_mode():
            return "was not launched with enable_sleep_mode on a GPU; leave level out, and its processes are ended"
        if order.action == "sleep" and not self._can_sleep():
            once = self._engine.spec.one_start
            return f"was not launched with enable_sleep_mode on GPUs, and cannot be started again in place: {once}"
        if order.action == "sleep" and not self._keeps_weights():
            return f"would lose the weights of {self._client.changed_weights}(); launch it with enable_sleep_mode"
        return None

    def in_flight(self) -> tuple[int, int]:
        """Number of requests in flight, and of those among them that wait."""
        return len(self._client.journal), len(self._client.journal.waiting())

    def _begun(self) -> list[Entry]:
        """Those that the gate does not hold."""
        return [entry for entry in self._client.journal if not entry.held]

    async def drained(self) -> None:
        """Return when no request is in flight but those that the gate holds."""
        await self._client.journal.until_closed(self._begun())

    async def freeze(self, mode: str, clear_cache: bool) -> None:
        """End what is in flight ("abort") or keep it ("keep"), and return when the engine does not step any more.

        Raises:
            EngineRestartingError: no engine served within ``recovery_timeout``.
        """
        if mode == "abort":
            await core_client.end_requests(self._engine.llm, [entry.id for entry in self._begun()])
        self._frozen = True
        while self._sleep is None:
            try:
                await core_client.pause(self._engine.llm, mode, clear_cache)
                return
            except EngineDiedError:  # the next one is asked
                continue

    async def thaw(self) -> None:
        """Have the engine step again; one that was started since is not paused."""
        # Of ranks that step together one that runs does not resume, and another would wait for it.
        frozen, self._frozen = self._frozen, False
        if frozen and not self._client.is_lost:
            with contextlib.suppress(EngineDiedError):
                await self._resume()

    async def _resume(self) -> None:
        try:
            await core_client.resume(self._engine.llm)
        except Exception as error:
            if not core_client.is_answer(error):
                raise
            # A rank that waits for others to pause does not resume before they do.
            await core_client.pause(self._engine.llm, "keep", False)
            await core_client.resume(self._engine.llm)

    async def fall_asleep(self, level: int | None) -> None:
        """Sleep until :meth:`wake`, even if it is wanted; return when it does."""
        while self._sleep is not None and self._sleep.is_waking:
            await self._sleep.ended()
        sleep = self._sleep or self._order(level, "it was asked to", is_idle=False)
        sleep.is_idle = False
        sleep.woken.clear()
        await sleep.begun()

    async def wake(self) -> None:
        """Return when it is awake.

        Raises:
            BackendError: it could not be woken.
        """
        if self._sleep is not None:
            self._sleep.woken.set()
            await self._sleep.ended()

    def go_on(self) -> None:
        """Open the gate, and send what it held."""
        self.admission.lets = Lets.ALL
        self._client.journal.release()
        self._sending = asyncio.ensure_future(self._client.go_on())

    def restart(self, reason: str) -> None:
        """End its processes and start others; requests go on."""
        if self._engine.lifecycle.state is State.READY:
            self.restart_wanted = f"The vLLM engine of {self.name} is ended: {reason}"
            self._engine.notice()
