"""One vLLM engine: started, watched and stopped."""

from __future__ import annotations

import multiprocessing.connection
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from ..errors import BackendError, EngineStartError, EngineStartTimeoutError, EngineStoppedError
from ..process.context import EngineContext
from ..process.exits import EXIT_REPORT, describe_exit
from ..process.output import OutputTail
from ..process.tree import ProcessTree
from ..settings import Settings
from . import arguments, diagnosis, vllm_seams

EXIT_TIMEOUT = 0.5  # seconds that a dead engine's processes have to end by themselves
KILL_TIMEOUT = 5.0  # seconds until a SIGKILLed process is given up as unkillable


class Phase(str, Enum):
    """What a launch is doing, in the order it does it."""

    ENVIRONMENT = "environment"
    CONFIGURATION = "engine configuration"
    PROCESSES = "processes"
    WEIGHTS = "weights"
    PROFILING = "memory profiling"
    WARM_UP = "warm-up"
    READY = "ready"


class EngineMember:
    """One AsyncLLM and its processes. Whatever is not its own it passes on to the AsyncLLM, once that is ready.

    Args:
        name: what to call the engine in threads, logs and errors.
        engine_args: a ``vllm.AsyncEngineArgs``.
        settings: the options of the model.
        on_phase: called, from several threads, with each phase of the start.
    """

    def __init__(
        self,
        name: str,
        engine_args: Any,
        settings: Settings,
        on_phase: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self.name = name
        self._engine_args = engine_args
        self._settings = settings
        self._on_phase = on_phase
        self._engine: Any = None
        self._phase = Phase.ENVIRONMENT
        self._lost: list[str] = []  # how Workers ended
        self._stopping = threading.Event()
        self._stop_lock = threading.Lock()
        self._tail = OutputTail()
        self._tree = ProcessTree()
        self._context = EngineContext(
            vllm_seams.SPAWN, vllm_seams.prepare_child, self._child_started, self._tail, self._report
        )

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
        arguments.check(self._engine_args)
        deadline = (time.monotonic() if since is None else since) + self._settings.load_timeout
        done = threading.Event()
        failures: list[BaseException] = []

        def load() -> None:
            try:
                self._load()
            except BaseException as error:  # handed to the thread that waits
                failures.append(error)
            finally:
                done.set()

        threading.Thread(target=load, name=f"vllm-engine-loader-{self.name}", daemon=True).start()
        in_time = done.wait(max(0.0, deadline - time.monotonic()))
        if in_time and not failures:
            self._enter(Phase.READY)
            return
        was_stopped = self._stopping.is_set()
        self.stop(0)
        if was_stopped:
            raise EngineStoppedError(f"The vLLM engine of {self.name} was stopped while it was starting.")
        if not in_time:
            said = diagnosis.last_words(self._tail.lines())
            raise EngineStartTimeoutError(
                f"The vLLM engine of {self.name} was not ready after {self._settings.load_timeout:g} s and was stopped "
                f"in the phase {self._phase.value!r}; raise load_timeout if the model needs longer."
                + (f" It last said: {said}" if said else "")
            )
        raise EngineStartError(self._start_failure(failures[0]))

    def _load(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        with vllm_seams.starts_from(self._context):
            self._enter(Phase.CONFIGURATION)
            self._engine = AsyncLLM.from_engine_args(self._engine_args)
        self._tree.record(child.pid for child in self._context.children)
        self._tail.clear()  # what was said until now explains no later death

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._on_phase(phase)

    def _child_started(self, name: str) -> None:
        if name != vllm_seams.INSPECTION_PROCESS:
            self._enter(Phase.PROCESSES)

    def _report(self, message: str) -> None:
        if message.startswith(EXIT_REPORT):
            # vLLM waits for the other Workers, which wait for this one, before it reports itself dead.
            self._lost.append(message.removeprefix(EXIT_REPORT))
        elif self._engine is None:  # a phase after READY is of no interest
            self._enter(Phase(message))

    def _start_failure(self, error: BaseException) -> str:
        cause = diagnosis.describe(error)
        self._context.await_output(EXIT_TIMEOUT)
        if any(child.exitcode for child in self._context.children):  # a child failed, so it knows better
            cause = diagnosis.root_cause(self._tail.lines()) or self._how_children_ended() or cause
        return f"The vLLM engine of {self.name} failed to start: {cause}"

    # -- watch

    def is_dead(self) -> bool:
        """Whether a process of the engine ended or vLLM says that it is dead; False while it was never ready."""
        engine = self._engine
        return engine is not None and (
            bool(self._lost) or any(child.exitcode is not None for child in self._serving()) or bool(engine.errored)
        )

    def processes(self) -> list[dict[str, Any]]:
        """The engine's living processes: pid and title of each."""
        self._tree.record(child.pid for child in self._context.children)
        return self._tree.describe()

    def death(self) -> str:
        """How the engine died, in a sentence with the root cause where one is known; blocks for up to a second.

        vLLM reports itself dead a moment before its processes have ended and their last lines are read.
        """
        multiprocessing.connection.wait([child.sentinel for child in self._serving()], EXIT_TIMEOUT)
        self._context.await_output(EXIT_TIMEOUT)
        how = ", ".join(self._lost) or self._how_children_ended() or "it reported itself dead"
        cause = diagnosis.root_cause(self._tail.lines())
        if cause in self._lost:
            cause = None
        return f"The vLLM engine of {self.name} died: {how}" + (f"; {cause}" if cause else "")

    def _serving(self) -> list[Any]:
        return [child for child in self._context.children if child.name != vllm_seams.INSPECTION_PROCESS]

    def _how_children_ended(self) -> str | None:
        ended = [child for child in self._serving() if child.exitcode is not None]
        return ", ".join(describe_exit(c.name, c.pid, c.exitcode) for c in ended) or None

    # -- stop

    def stop(self, timeout: float) -> None:
        """Stop the engine in whatever state it is; idempotent. Blocks, so never call it on an event loop.

        Args:
            timeout: seconds for an orderly shutdown; what is left then is killed.

        Raises:
            BackendError: a process survived SIGKILL for 5 s.
        """
        self._stopping.set()
        self._context.seal()
        with self._stop_lock:
            self._tree.record(child.pid for child in self._context.children)
            if self._engine is not None and timeout > 0:
                shutdown = threading.Thread(target=self._engine.shutdown, name="vllm-engine-shutdown", daemon=True)
                shutdown.start()
                shutdown.join(timeout)
            left = self._tree.kill(KILL_TIMEOUT)
            for child in self._context.children:
                child.join(KILL_TIMEOUT)  # reap it
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise BackendError(f"Processes of the vLLM engine of {self.name} could not be killed: pid {pids}")
