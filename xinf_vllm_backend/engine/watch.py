"""Watches one set of engine processes until they die, hang or are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..settings import Settings
from .client import EngineClient
from .death import Ending
from .health import HangClock, Workload
from .processes import EngineProcesses
from .seams import core_client, platform

BUSY_FACTOR_CPU, BUSY_FACTOR_GPU = 10.0, 3.0  # what busy_factor=0 means


def busy_factor(settings: Settings) -> float:
    """The ``busy_factor`` of ``settings``, or the default of this host where it is 0."""
    return settings.busy_factor or (BUSY_FACTOR_CPU if platform.is_cpu_build() else BUSY_FACTOR_GPU)


class Watch:
    """Looks at an engine every ``health_interval``, and at once when :meth:`notice` is called.

    Args:
        processes: those to watch.
        client: through which their outputs go.
        settings: the options of the model.
        on_look: called at each look, on the event loop; False ends the watch.
    """

    def __init__(
        self, processes: EngineProcesses, client: EngineClient, settings: Settings, on_look: Callable[[], bool]
    ) -> None:
        self._processes = processes
        self._client = client
        self._settings = settings
        self._on_look = on_look
        self._hang = HangClock(settings.hang_timeout, busy_factor(settings), settings.health_interval)
        self._workload = Workload()
        self._noticed = asyncio.Event()
        self._heartbeat: asyncio.Task[None] | None = None
        self._delivered = -1

    @property
    def limit(self) -> float:
        """Seconds without a sign of life or of work that make a hang."""
        return self._hang.limit

    def notice(self) -> None:
        """Look now: something may have ended. Call it on the event loop."""
        self._noticed.set()

    async def until_end(self) -> Ending:
        """Return how the engine ended, or that it hangs."""
        # Of its own, so that no other work of this process can keep a look waiting.
        thread = ThreadPoolExecutor(1, "vllm-engine-look")
        try:
            while not (self._processes.is_dead() or self._client.is_lost):
                if await self._hangs(thread):
                    return Ending.HUNG
                if not self._on_look():
                    break
                await self._next_look()
            return Ending.DIED
        finally:
            if self._heartbeat is not None:
                self._heartbeat.cancel()
            thread.shutdown(wait=False)

    async def _hangs(self, thread: ThreadPoolExecutor) -> bool:
        flows = self._delivered != self._client.journal.outputs
        self._delivered = self._client.journal.outputs
        answered = self._heartbeat is not None and self._heartbeat.done()
        hung = False
        if flows:
            self._hang.heard()
        else:
            loop = asyncio.get_running_loop()
            look = await loop.run_in_executor(thread, self._processes.look)  # reads /proc
            if (answered or self._need_not_answer()) and not look.halted:
                self._hang.heard()
            else:
                works = not look.halted and self._workload.works(look.workers, look.others)
                hung = self._hang.look(works, self._patience)
        if self._heartbeat is None or answered:
            self._heartbeat = None if flows else self._ask()
        return hung

    def _need_not_answer(self) -> bool:
        """Whether the engine has nothing to do and cannot be asked for a sign of life."""
        journal = self._client.journal
        return not core_client.has_heartbeat(self._processes.client) and (not len(journal) or journal.aborts_wanted)

    def _ask(self) -> asyncio.Task[None]:
        return asyncio.ensure_future(core_client.ask_sign_of_life(self._processes.client))

    @property
    def _patience(self) -> float:
        """An engine that carries out a call answers no heartbeat until that is done."""
        return self._settings.call_timeout if self._client.calls else 0.0

    async def _next_look(self) -> None:
        noticed = asyncio.ensure_future(self._noticed.wait())
        try:
            await asyncio.wait([noticed], timeout=self._settings.health_interval)
        finally:
            noticed.cancel()
        self._noticed.clear()
