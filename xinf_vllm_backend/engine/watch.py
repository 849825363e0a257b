"""Watches one set of engine processes until they die, hang or are stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..process.tree import Look
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


def _clock(settings: Settings) -> HangClock:
    return HangClock(settings.hang_timeout, busy_factor(settings), settings.health_interval)


class RankWatch:
    """Looks for signs of life of one data-parallel rank, or of a whole engine.

    Args:
        rank: the one; None for a whole engine.
        processes: of the engine.
        client: through which its outputs go.
        settings: the options of the model.

    Attributes:
        clock: for how long it has been silent.
        works: whether it was seen computing at the last look, without any other sign of life.
    """

    def __init__(self, rank: int | None, processes: EngineProcesses, client: EngineClient, settings: Settings) -> None:
        self.rank = rank
        self.clock = _clock(settings)
        self.works = False
        self._processes = processes
        self._client = client
        self._workload = Workload()
        self._heartbeat: asyncio.Task[None] | None = None
        self._delivered = -1
        self._answered = self._alive = self._halted = False

    def gave_outputs(self) -> bool:
        """Whether it gave outputs since the last call; no other sign is then looked for."""
        outputs = self._client.journal.outputs
        delivered = outputs.total() if self.rank is None else outputs[self.rank]
        flows, self._delivered = delivered != self._delivered, delivered
        self._answered = self._heartbeat is not None and self._heartbeat.done()
        if flows:
            self.clock.heard()
            self.works = False
            if self._answered:
                self._heartbeat = None
        return flows

    def look(self, look: Look) -> None:
        """Note what its processes did, and ask it for another sign of life."""
        self._halted = bool(look.halted)
        self._alive = not self._halted and (self._answered or self._need_not_answer())
        if self._alive:
            self.clock.heard()
        self.works = not (self._alive or self._halted) and self._workload.works(look.workers, look.others)
        if self._heartbeat is None or self._answered:
            ask = core_client.ask_sign_of_life(self._processes.client, self.rank)
            self._heartbeat = asyncio.ensure_future(ask)

    def hangs(self, patience: float, others_work: bool) -> bool:
        """Whether it hangs, as :meth:`look` saw it.

        Args:
            patience: seconds of silence that make a hang now, where that is more than ``hang_timeout``.
            others_work: whether it may be idle because it waits for a rank that computes.
        """
        works = self.works or (others_work and not self._halted)
        return not self._alive and self.clock.look(works, patience)

    def cancel(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    def _need_not_answer(self) -> bool:
        """Whether the engine has nothing to do and cannot be asked for a sign of life."""
        journal = self._client.journal
        return not core_client.has_heartbeat(self._processes.client) and (not len(journal) or journal.aborts_wanted)


class Watch:
    """Looks at an engine every ``health_interval``, and at once when :meth:`notice` is called.

    Args:
        processes: those to watch.
        client: through which their outputs go.
        settings: the options of the model.
        on_look: called at each look, on the event loop; False ends the watch.
        step_timeout: seconds that a step may take in ranks that are not among the processes; 0 if all are.

    Attributes:
        silent: names of the parts of a data-parallel engine that hang; empty where that is all of it.
    """

    def __init__(
        self,
        processes: EngineProcesses,
        client: EngineClient,
        settings: Settings,
        on_look: Callable[[], bool],
        step_timeout: float = 0.0,
    ) -> None:
        self._processes = processes
        self._client = client
        self._settings = settings
        self._on_look = on_look
        self._step_timeout = step_timeout
        ranks = core_client.ranks(processes.client) or (None,)
        self._ranks = [RankWatch(rank, processes, client, settings) for rank in ranks]
        self._rest = _clock(settings)  # of what belongs to no rank: the coordinator
        self._waits_idle = platform.is_cpu_build()
        self._noticed = asyncio.Event()
        self.silent: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Seconds without a sign of life or of work that make a hang."""
        return max(rank.clock.limit for rank in self._ranks)

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
            for rank in self._ranks:
                rank.cancel()
            thread.shutdown(wait=False)

    async def _hangs(self, thread: ThreadPoolExecutor) -> bool:
        quiet = [rank for rank in self._ranks if not rank.gave_outputs()]
        if not quiet:
            return False
        look = await asyncio.get_running_loop().run_in_executor(thread, self._processes.look)  # reads /proc
        ranks = self._processes.ranks() if len(self._ranks) > 1 else {}
        for rank in quiet:
            rank.look(look.of(pids) if (pids := [pid for pid in ranks if ranks[pid] == rank.rank]) else look)
        hung = [rank for rank in quiet if rank.hangs(self._patience, self._may_wait(rank, quiet))]
        rest_hangs = bool(ranks) and self._rest_hangs(look.without(ranks))
        self.silent = self._names(rest_hangs) if hung or rest_hangs else ()
        return bool(hung) or rest_hangs

    def _names(self, rest_hangs: bool) -> tuple[str, ...]:
        """What hangs, or is about to."""
        about = [rank for rank in self._ranks if rank.clock.silent > rank.clock.limit - self._settings.health_interval]
        ranks = [] if len(about) == len(self._ranks) else [f"rank {rank.rank}" for rank in about]
        return (*ranks, "coordinator") if rest_hangs else tuple(ranks)

    def _may_wait(self, rank: RankWatch, quiet: list[RankWatch]) -> bool:
        """Whether ``rank`` may wait for another one, in a step that they take together; on GPUs it would spin."""
        return self._waits_idle and any(other.works for other in quiet if other is not rank)

    def _rest_hangs(self, look: Look) -> bool:
        if not look.halted:  # nobody can ask it
            self._rest.heard()
            return False
        return self._rest.look(False)

    @property
    def _patience(self) -> float:
        """An engine that carries out a call, or waits for ranks elsewhere, answers no heartbeat until that is done."""
        call = self._settings.call_timeout if self._client.calls else 0.0
        return max(call, self._step_timeout) if len(self._client.journal) else call

    async def _next_look(self) -> None:
        noticed = asyncio.ensure_future(self._noticed.wait())
        try:
            await asyncio.wait([noticed], timeout=self._settings.health_interval)
        finally:
            noticed.cancel()
        self._noticed.clear()
