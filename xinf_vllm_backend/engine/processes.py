"""One set of engine processes: EngineCore, its Workers and its coordinator; started once, watched, and ended once."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import BackendError, EngineStartError, EngineStartTimeoutError, EngineStoppedError
from ..process.bootstrap import InheritedHandles
from ..process.cleanup import Cleanup
from ..process.context import EngineContext
from ..process.exits import describe_exit
from ..process.launch_lock import DeviceLocks, launch_lock
from ..process.output import OutputTail
from ..process.tree import Look
from . import diagnosis, preload
from .death import Death, Ending
from .phase import Phase
from .seams import core_client, platform, start
from .seams.child import prepare_child
from .spec import EngineSpec

logger = logging.getLogger(__name__)

EXIT_TIMEOUT = 0.5  # seconds that a dead engine's processes have to end by themselves
STACKS_TIMEOUT = 1.0  # seconds in which the processes of a hung engine show their stacks
KILL_TIMEOUT = 20.0  # seconds until a SIGKILLed process, which may wait for a slow disk, is given up as unkillable
LOCK_MARGIN = 1.0  # seconds before load_timeout in which a launch that waits for others can still say for whom
REMOVE_TIMEOUT = 2.0  # seconds until files of a dead engine are left to the janitor


class EngineProcesses:
    """The processes of one engine, from their start to their end.

    Args:
        spec: what the engine is made from.
        on_loss: called, from several threads, when a process has ended, or was reported to have ended badly.

    Attributes:
        client: vLLM's client of EngineCore, once that is ready.
        may_be_the_fork: whether they were forked, and failed to start in a way in which spawned ones might not.
    """

    def __init__(self, spec: EngineSpec, on_loss: Callable[[], None] = lambda: None) -> None:
        self._spec = spec
        self._on_loss = on_loss
        self.client: Any = None
        self.may_be_the_fork = False
        self._made: Any = None
        self._resources: list[Any] = []
        self._phase = Phase.ENVIRONMENT
        self._deadline = 0.0
        self._woken = threading.Event()  # loaded, failed or stopped
        self._stopping = threading.Event()
        self._stop_lock = threading.Lock()
        self._cleanup: Cleanup | None = None
        self._tail = OutputTail(on_line=spec.on_line)
        self._context = EngineContext(
            spec.environment,
            prepare_child,
            self._child_started,
            self._tail,
            self._report,
            find_zygote=lambda: preload.zygote_client(spec.settings.engine_start_method),
            on_loss=on_loss,
        )

    # -- start

    def start(self, make: Callable[[], Any], since: float | None = None) -> Any:
        """Call ``make`` on a thread of its own and wait until it returns, ``load_timeout`` seconds at most.

        Args:
            make: starts the engine, by one of vLLM's classes, and returns when it is ready.
            since: ``time.monotonic()`` from which the time counts; by default now.

        Returns:
            What ``make`` returned.

        Raises:
            EngineStartTimeoutError: it was not ready in time.
            EngineStoppedError: it was stopped while it started.
            EngineStartError: anything else, with the root cause.
        """
        self._deadline = (time.monotonic() if since is None else since) + self._spec.settings.load_timeout
        preload.start_zygote(self._spec.settings.engine_start_method, self._spec.arguments.model)
        failures: list[BaseException] = []

        def load() -> None:
            try:
                self._load(make)
            except BaseException as error:  # handed to the thread that waits
                failures.append(error)
                self._release()
            finally:
                self._woken.set()

        threading.Thread(target=load, name=f"vllm-engine-loader-{self._spec.name}", daemon=True).start()
        in_time = self._woken.wait(self._left())
        if in_time and not failures and not self._stopping.is_set():
            return self._made
        was_stopped = self._stopping.is_set()
        if not in_time:
            self._log_stacks()
        left = self._stop_or_say()
        if was_stopped:
            raise EngineStoppedError(f"The vLLM engine of {self._spec.name} was stopped while it was starting.{left}")
        if not in_time:
            said = diagnosis.last_words(self._tail.lines())
            raise EngineStartTimeoutError(
                f"The vLLM engine of {self._spec.name} was not ready after {self._spec.settings.load_timeout:g} s "
                f"and was stopped in the phase {self._phase.value!r}; raise load_timeout if the model needs longer."
                + (f" It last said: {said}" if said else "")
                + left
            )
        if isinstance(failures[0], EngineStartError):  # a lock that another launch holds
            raise failures[0]
        raise EngineStartError(self._start_failure(failures[0]) + left) from failures[0]

    def _stop_or_say(self) -> str:
        """End what was started; a sentence with the processes that could not be killed, "" if there is none."""
        try:
            self.stop()
        except BackendError as error:
            return f" {error}"
        return ""

    def _log_stacks(self) -> None:
        """Say, before a start that takes too long is ended, what its processes do."""
        for stack in self._context.stacks(STACKS_TIMEOUT):
            logger.error(
                "%s (pid %s) of %s, at the end of load_timeout:\n%s",
                stack.title,
                stack.pid,
                self._spec.name,
                stack.text,
            )

    def _load(self, make: Callable[[], Any]) -> None:
        devices = platform.devices(self._spec.arguments, self._spec.settings.device_locks)
        with contextlib.ExitStack() as held:
            # Devices before the launch lock: its holder never waits for a device.
            locks = held.enter_context(DeviceLocks(devices, self._spec.name))
            locks.acquire(self._left(LOCK_MARGIN), self._stopping)
            launch = held.enter_context(launch_lock.hold(self._spec.name, self._left(LOCK_MARGIN), self._stopping))
            held.enter_context(start.starts_from(self._context, launch.release, self._resources))
            self._mark_for_cleanup()
            self._enter(Phase.CONFIGURATION)
            self._made = make()
        self._tail.clear()  # what was said until now explains no later death
        threading.Thread(target=self._await_loss, name=f"vllm-engine-ends-{self._spec.name}", daemon=True).start()

    def _await_loss(self) -> None:
        # vLLM looks at no coordinator, and ends the other ranks before it tells that one has died.
        if sentinels := [child.sentinel for child in self._serving()]:
            multiprocessing.connection.wait(sentinels)
            self._on_loss()

    def _mark_for_cleanup(self) -> None:
        """Have all that this engine may leave behind marked and removed with its last process."""
        with self._stop_lock:
            if self._stopping.is_set():
                raise EngineStoppedError(f"The launch of {self._spec.name} was stopped.")
            self._cleanup = cleanup = Cleanup(platform.rpc_base())
        self._context.handles = InheritedHandles(mark=cleanup.mark, alive=cleanup.alive)
        os.environ.update(platform.rpc_directory(cleanup.directory))  # on this thread

    def _left(self, margin: float = 0.0) -> float:
        return max(0.0, self._deadline - margin - time.monotonic())

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._spec.on_phase(phase)

    def _child_started(self, name: str) -> None:
        if name != start.INSPECTION_PROCESS:
            self._enter(Phase.PROCESSES)

    def _report(self, message: str) -> None:
        if self._made is None:  # a phase after READY is of no interest
            self._enter(Phase(message))

    def _start_failure(self, error: BaseException) -> str:
        cause = diagnosis.describe(error)
        self._context.await_output(EXIT_TIMEOUT)
        if any(child.exitcode for child in self._context.children):  # a child failed, or was ended with the rest
            died = self._how_children_ended() if diagnosis.is_second_hand(cause) else None
            cause = diagnosis.root_cause(self._tail.lines()) or died or cause
        ended = [*self._context.lost, *_how_ended(self._context.children)]
        self.may_be_the_fork = self._were_forked() and diagnosis.may_be_the_fork(cause, ended)
        return f"The vLLM engine of {self._spec.name} failed to start: {cause}"

    def _were_forked(self) -> bool:
        return any(child.was_forked for child in self._context.children)

    def _release(self) -> None:
        while self._resources:  # each once: a ZeroMQ context that is ended twice at a time aborts this process
            core_client.release(self._resources.pop())

    # -- watch

    def is_dead(self) -> bool:
        """Whether one of the processes ended or vLLM says that the engine is dead; False while it was never ready."""
        # A lost Worker is enough: vLLM waits for the others, which wait for that one, before it reports itself dead.
        return self._made is not None and (
            bool(self._context.lost)
            or any(child.exitcode is not None for child in self._serving())
            or core_client.is_dead(self.client)
        )

    def look(self) -> Look:
        """Whether one of the processes is stopped, and how many seconds of CPU each used so far; reads /proc."""
        return self._context.tree.look(platform.WORKER)

    def ranks(self) -> dict[int, int]:
        """The data-parallel rank of each process that has one, by pid."""
        ranks = {pid: platform.rank_of(child) for pid, child in self._context.families.copy().items()}
        return {pid: rank for pid, rank in ranks.items() if rank is not None}

    def processes(self) -> list[dict[str, Any]]:
        """The engine's living processes: pid and title of each, and whether it said that it was forked or spawned."""
        origins = self._context.origins
        found = self._context.tree.describe()
        return [{**one, "started": origins.get(int(one["pid"]), "unknown")} for one in found]

    def death(self) -> str:
        """How the engine died, in a sentence with the root cause where one is known; blocks for up to a second."""
        how = self._how_it_ended()
        self._context.await_output(EXIT_TIMEOUT)
        return self._death(how)

    def _how_it_ended(self) -> str:
        if not (self._context.lost or self._how_children_ended()):
            # vLLM reports itself dead a moment before its processes have ended.
            multiprocessing.connection.wait([child.sentinel for child in self._serving()], EXIT_TIMEOUT)
        return ", ".join(self._context.lost) or self._how_children_ended() or "it reported itself dead"

    def _death(self, how: str) -> str:
        cause = diagnosis.root_cause(self._tail.lines())
        if cause in self._context.lost:
            cause = None
        return f"The vLLM engine of {self._spec.name} died: {how}" + (f"; {cause}" if cause else "")

    def _serving(self) -> list[Any]:
        return [child for child in self._context.children if child.name != start.INSPECTION_PROCESS]

    def _how_children_ended(self) -> str | None:
        return ", ".join(_how_ended(self._serving())) or None

    # -- stop

    def end(self, ending: Ending, silent: float = 0.0, who: Sequence[str] = ()) -> Death:
        """End what is left of a dead or hung engine, and say how it died. Blocks for some seconds at most.

        Args:
            ending: as the watch saw it.
            silent: seconds for which a hung one gave no sign of life.
            who: names of its parts that gave none; empty for all of it.
        """
        hung = ending is Ending.HUNG
        stacks = tuple(self._context.stacks(STACKS_TIMEOUT)) if hung else ()
        how = self._hang(silent, who) if hung else self._how_it_ended()  # before the rest of it is killed
        try:
            self.stop(lambda: self.client.shutdown(timeout=0), EXIT_TIMEOUT, kill=True)
        except Exception as error:  # the next one is not started before this one is gone
            logger.exception("What is left of the vLLM engine of %s could not be ended: %s", self._spec.name, error)
        self._context.await_output(EXIT_TIMEOUT)
        return Death(how if hung else self._death(how), hung=hung, stacks=stacks)

    def _hang(self, silent: float, who: Sequence[str]) -> str:
        parts = f"its {' and '.join(who)} {'has' if len(who) == 1 else 'have'}" if who else "it has"
        name = self._spec.name
        return f"The vLLM engine of {name} hangs: for {silent:g} s {parts} given no sign of life and done no work"

    def stop(self, shut_down: Callable[[], None] | None = None, timeout: float = 0.0, kill: bool = False) -> None:
        """End the processes in whatever state they are; idempotent. Blocks, so never call it on an event loop.

        Args:
            shut_down: begins an orderly end of a living engine, and returns when it has ended.
            timeout: seconds for that; what is left then is killed.
            kill: do not wait for that of the processes.

        Raises:
            BackendError: a process survived SIGKILL for 20 s.
        """
        self._stopping.set()
        self._woken.set()
        self._context.seal()
        with self._stop_lock:
            if kill or self.is_dead():  # what is left of it would use up the time
                self._context.tree.kill(KILL_TIMEOUT)
            if shut_down is not None and timeout > 0:
                orderly = threading.Thread(target=shut_down, name="vllm-engine-shutdown", daemon=True)
                orderly.start()
                orderly.join(timeout)
            left = self._context.tree.kill(KILL_TIMEOUT)
            for child in self._context.children:
                child.join(KILL_TIMEOUT)  # reap it
                child.release()
            if self._made is not None:  # else the thread that makes it does that
                self._release()
            if self._cleanup is not None:
                self._cleanup.remove(REMOVE_TIMEOUT)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise BackendError(f"Processes of the vLLM engine of {self._spec.name} could not be killed: pid {pids}.")


def _how_ended(children: Iterable[Any]) -> list[str]:
    return [describe_exit(child.name, child.pid, child.exitcode) for child in children if child.exitcode is not None]
