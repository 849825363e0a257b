"""A model actor and its engine: what is the same for every kind of model that vLLM serves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from ..engine import diagnosis, preload
from ..engine.lifecycle import Move, State
from ..engine.phase import Phase
from ..engine.seams import platform, version
from ..engine.spec import EngineSpec
from ..engine.supervisor import EngineSupervisor
from ..engine.watch import busy_factor
from ..errors import BackendError, BadLaunchArgumentError, EngineStartError, EngineStoppedError
from ..settings import Settings, variable
from . import cluster_link, controlled, engine_log, metrics, model_process, pickling, replica_log, xinference_version
from .cluster_link import ClusterLink
from .push import ids, model_side
from .versions import check_vllm, versions

logger = logging.getLogger("xinference.vllm_backend")

START_METHOD = "engine_start_method"
EXIT_STATUS = 1  # tells Xinference to start the model process again


class Hosted(controlled.Controlled):
    """A mixin for Xinference's classes on vLLM: they prepare the engine's arguments, and it runs the engine.

    An instance is pickled twice before ``load()``, so until then it holds only plain data.
    """

    model_family: Any
    raw_model_uid: str
    _engine: Any
    _loop: Any
    _check_health_task: asyncio.Task[None] | None

    @staticmethod
    def _options_in(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
        """Take our options out of the ``arguments`` of a launch, in the worker, before anything is made.

        Raises:
            BadLaunchArgumentError: one is bad.
            UnsupportedVersionError: this package was not made for the installed Xinference.
        """
        xinference_version.check()
        options = Settings.options_in(arguments)
        Settings.resolve(options)
        return options

    def _host(self, options: Mapping[str, Any], given: Iterable[str]) -> None:
        """Prepare for :meth:`load`; called by ``__init__`` when Xinference's own is done.

        Args:
            options: ours, of those that the launch gave.
            given: names of the others.
        """
        self._options = dict(options)
        self._worker_prefix, self._cpu_host = sys.prefix, platform.is_cpu_build()
        self._given = frozenset(given)
        self._death_recorded = False  # that of the engine which is being restarted
        self._environment: dict[str, str] = {}  # variables of the engine alone
        self._stop_requested = False
        self._death: asyncio.Task[str] | None = None
        self.is_launched_again = False  # after a death which this process outlives
        self._link: ClusterLink | None = None
        self.push_links = model_side.Links()
        replica_log.begin(self.raw_model_uid)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickling.reduce_model(self, self._options.get(START_METHOD), variable(START_METHOD), self._directory())

    def _ranks_elsewhere(self) -> bool:
        """Whether the ranks of the engine are processes of several workers, and not its own."""
        return False

    def _one_start(self) -> str:
        """Why the processes of the engine can be started once alone, a sentence; "" if they can be started again."""
        return ""

    def _directory(self) -> str:
        """The directory of the model."""
        raise NotImplementedError

    # -- load

    def _begin_load(self) -> float:
        """Prepare this process for the engine; ``time.monotonic()`` at the beginning of the load."""
        started = time.monotonic()
        self._settings = Settings.resolve(self._options)
        self._busy_factor = busy_factor(self._settings)
        model_process.stacks_file()
        metrics.install_in_model_process()
        model_side.install_in_model_process()
        ids.install()
        if self._loop is not None:
            self._link = ClusterLink(self.model_family.address, self.raw_model_uid)
        self._show(Phase.ENVIRONMENT)
        return started

    def _check_vllm(self) -> None:
        check_vllm(self._worker_prefix, self._cpu_host, self.model_family.model_name)

    def _greet(self) -> None:
        """Be paused as the process before this one was, and say how that one died; blocks."""
        how = "is paused again" if self._restore_pause() else "serves again"
        for death in replica_log.read(self.raw_model_uid).last[-1:]:
            self._announce(f"The model {self.raw_model_uid} {how}, after this: {death['reason']}")

    def _started(self, since: float, engine_args: Any) -> EngineSupervisor:
        """Start the engine while Xinference's class makes it, and not afterwards."""
        engine = self._engine = self._make_supervisor(engine_args)
        if self._stop_requested:
            raise EngineStoppedError(f"The model {self.raw_model_uid} was stopped while it was loading.")
        engine_log.include_vllm_logger()
        engine.start(since)
        return engine

    def _make_supervisor(self, engine_args: Any) -> EngineSupervisor:
        spec = EngineSpec(
            self.raw_model_uid,
            engine_args,
            self._settings,
            self._environment,
            on_phase=self._show,
            on_line=engine_log.write,
            on_move=self._moved,
            on_inexact=lambda request_id, why: self._count(cluster_link.INEXACT),
            why_not_again=self._why_not_again,
            one_start=self._one_start(),
            ranks_elsewhere=self._ranks_elsewhere(),
        )
        supervisor = EngineSupervisor(spec)
        supervisor.control.on_change = functools.partial(replica_log.record_pause, self.raw_model_uid)
        return supervisor

    def _why_not_again(self) -> str:
        """Why the engine cannot be restarted in place, a sentence; "" if it can."""
        return ""

    def _show(self, phase: Phase) -> None:
        logger.info("Loading %s: %s", self.raw_model_uid, phase.value)
        if self._link is not None:
            asyncio.run_coroutine_threadsafe(self._link.show_phase(phase), self._loop)

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Raise any exception as one of our errors with exactly one string, which can cross the process border."""
        with _without_chain():
            try:
                yield
            except (BackendError, BadLaunchArgumentError) as error:
                logger.error("%s", error)
                raise type(error)(str(error)) from None
            except Exception as error:
                logger.exception("Loading %s failed", self.raw_model_uid)
                kind = BadLaunchArgumentError if isinstance(error, (TypeError, ValueError)) else EngineStartError
                raise kind(f"The model {self.raw_model_uid} could not be loaded: {_in_words(error)}") from None

    # -- health

    async def _check_healthy(self, interval: float = 30) -> None:
        """Created as a task by ``wait_for_load``, cancelled by ``stop``; ``interval`` is upstream's and not used."""
        if await self._engine.watch():
            await self.engine_died()

    def _moved(self, move: Move) -> None:
        """Tell the cluster that the engine is being restarted in place, and that it is back."""
        name = self.raw_model_uid
        if move.death is not None:
            self._death_recorded = True
            replica_log.record(name, move.death.reason, move.death.details())
            self._count(cluster_link.DEATHS)
        if move.state is State.RESTARTING:
            self._announce(f"{move.reason}. It is being restarted in place, and requests wait for it.", error=True)
        elif move.state is State.STALE:
            self._death_recorded = False
            self._announce(f"The vLLM engine of {name} does not serve: {move.reason}.", error=True)
        elif move.state is State.ASLEEP:
            self._count(cluster_link.SLEEPS)
            self._announce(f"The vLLM engine of {name} sleeps: {move.reason}.")
        elif move.state is State.READY and move.previous is State.WAKING:
            self._count(cluster_link.WAKINGS)
            self._announce(f"The vLLM engine of {name} is awake: {move.reason}.")
        elif move.state is State.READY and move.previous is not State.STARTING:
            self._death_recorded = False
            self._count(cluster_link.RESTARTS)
            self._announce(f"The vLLM engine of {name} serves again: {move.reason}.")

    def _announce(self, text: str, *, error: bool = False) -> None:
        if self._link is not None:
            asyncio.run_coroutine_threadsafe(self._link.announce(text, error=error), self._loop)

    def _count(self, metric: str) -> None:
        if self._link is not None:
            asyncio.run_coroutine_threadsafe(self._link.count(metric), self._loop)

    def is_stopping(self) -> bool:
        return self._stop_requested

    async def engine_died(self) -> str:
        """End this process because its engine is dead; Xinference then starts the model again.

        Idempotent. The process ends before a caller continues.

        Returns:
            How the engine died, for the log.
        """
        if self._death is None:
            self._death = asyncio.get_running_loop().create_task(self._give_up())
        return await asyncio.shield(self._death)

    async def _give_up(self) -> str:
        how = self._engine.failure or await asyncio.to_thread(self._engine.death)
        reason = f"{how}. The model process ends so that Xinference starts the model again."
        logger.error("%s", reason)
        if self._death_recorded:  # it was to be restarted, and could not be
            replica_log.amend(self.raw_model_uid, reason)
        else:
            replica_log.record(self.raw_model_uid, reason)
        await self._attempt(asyncio.to_thread(replica_log.flush))
        if self._link is not None:
            await self._attempt(self._link.announce_death(reason, count=not self._death_recorded))
        # The next engine may not start while this one is alive.
        await self._attempt(asyncio.to_thread(self._end))
        os._exit(EXIT_STATUS)

    async def _attempt(self, step: Awaitable[Any]) -> None:
        try:
            await step
        except Exception:  # the next step must follow
            logger.exception("A step after the death of the engine of %s failed", self.raw_model_uid)

    async def offer_push_link(self) -> dict[str, Any]:
        """Where an API process can make a link for the streams of this model, as plain data.

        Raises:
            RuntimeError: it is switched off, or cannot be.
        """
        if (reason := model_side.why_pulled()) is not None:
            raise RuntimeError(f"The model {self.raw_model_uid} pushes no streams: {reason}.")
        self.push_links.fingerprint = self._fingerprint()
        offered = await self.push_links.offer(self.model_family.address.rpartition(":")[0])
        return offered | {"failover": self._failover()}

    def _failover(self) -> dict[str, Any] | None:
        """What an API process has to know to have requests outlive this process; None if they do not."""
        if model_side.why_not_failed_over() is not None:
            return None
        given = self._settings
        return {"recovery_timeout": given.recovery_timeout, "max_deaths": given.max_deaths_per_request}

    def _fingerprint(self) -> str:
        """Of what decides how a request goes on: the weights, and all that the launch gave."""
        asked = (*self._asked(), version.version())
        return hashlib.blake2b(repr(asked).encode(), digest_size=8).hexdigest()

    def _asked(self) -> tuple[Any, ...]:
        """What decides how a request goes on, but for the version of vLLM."""
        raise NotImplementedError

    def _given_of(self, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Those of ``arguments`` that the launch gave."""
        return sorted((name, repr(value)) for name, value in arguments.items() if name in self._given)

    async def heartbeat(self) -> dict[str, Any]:
        """What the worker has to know to judge this process, as plain data; the answer says that its event loop runs.

        Returns:
            ``settings``, all in force; ``busy_factor``, never 0; ``stacks``, the file descriptor by which it shows its
            stacks, or None.
        """
        return {
            "settings": self._settings.model_dump(),
            "busy_factor": self._busy_factor,
            "stacks": model_process.stacks_file(),
        }

    async def engine_status(self) -> dict[str, Any]:
        """State, processes and past deaths of this replica's engine, as plain data."""
        engine = self._engine
        log = await asyncio.to_thread(replica_log.read, self.raw_model_uid)
        return {
            "replica": self.raw_model_uid,
            **({"state": State.STARTING.value, "processes": []} if engine is None else self._of(engine)),
            **controlled.status_of(engine),
            "pid": os.getpid(),
            "started": model_process.how_started(),
            "python": sys.executable,
            "zygote": preload.zygote_pid(),
            "push": {"off": reason} if (reason := model_side.why_pulled()) is not None else self.push_links.status(),
            "settings": self._settings.model_dump(),
            "versions": await asyncio.to_thread(versions),
            **replica_log.summary(log),
        }

    @staticmethod
    def _of(engine: EngineSupervisor) -> dict[str, Any]:
        moves = engine.lifecycle.history
        return {
            "state": engine.lifecycle.state.value,
            "reason": moves[-1].reason if moves else "",
            "restarts": engine.restarts,
            "requests": engine.requests(),
            "processes": engine.processes(),
        }

    # -- stop

    def stop(self) -> None:
        """Stop the engine in any state; idempotent and bounded. Blocks, so never call it on an event loop."""
        if not self.is_launched_again:
            replica_log.forget(self.raw_model_uid)
        try:
            self._end()
        finally:
            replica_log.flush()

    def _end(self) -> None:
        self._stop_engine()

    def _stop_engine(self) -> None:
        self._stop_requested = True
        task, self._check_health_task = self._check_health_task, None
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)
        if self._engine is not None:  # else load() sees that it was asked to stop
            self._engine.stop(self._settings.stop_timeout)


@contextlib.contextmanager
def _without_chain() -> Iterator[None]:
    """Drop what an error came from: xoscar pickles that, too, and some of it cannot be pickled."""
    try:
        yield
    except Exception as error:
        error.__cause__ = error.__context__ = None
        raise


def undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` without the check that Xinference decorates it with, which stops the model on the event loop."""
    return getattr(method, "__wrapped__", method)


def _in_words(error: Exception) -> str:
    unknown = re.search(r"AsyncEngineArgs.*unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        return f"vLLM {version.version()} has no engine argument {unknown[1]!r}; leave it out or correct its name."
    return diagnosis.describe(error)
