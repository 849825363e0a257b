"""The multiprocessing context that engine processes are started from.

This process is never forked: a child would inherit the locks that its threads hold. Children are forked by the zygote
if there is one, else spawned. Each runs :mod:`.bootstrap` first; its target and arguments travel as one nested
blob, so that they are unpickled after the environment is set and so that ``Process.start()`` does not wait for the
child's imports.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from multiprocessing.connection import Pipe
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from . import bootstrap
from .bootstrap import ChildSetup, InheritedHandles
from .exits import EXIT_REPORT, announce_exit
from .output import ChildOutput, OutputTail
from .popen import EndedPopen, SpawnPopen, ZygotePopen, occupy_standard_streams
from .stacks import Stack, StackReader
from .tree import ProcessTree
from .zygote.client import ZygoteClient, ZygoteUnavailableError

logger = logging.getLogger(__name__)

FindZygote = Callable[[], "ZygoteClient | None"]


class EngineContext(SpawnContext):
    """Starts engine processes and remembers them.

    Args:
        environment: variables of every child, over those of this process at the moment it is started.
        on_loss: called, on a thread of this context, after an addition to ``lost``.
        initializer: importable function that a child calls after its environment is set, before its target.
        on_start: called with the name of each child that was started.
        tail: where the output of the children and of their descendants is kept; None lets them inherit ours.
        on_report: called with each message that a child or descendant sends by :func:`.bootstrap.report`, on a
            thread of this context; needs ``tail``.
        handles: what the children share with theirs, by default what this process shares with its own; each child gets
            a pipe for reports of its own where there is a tail.
        find_zygote: called at each start, returns the zygote to fork the child from; if it returns None or raises
            :class:`.ZygoteUnavailableError`, the child is spawned. By default the zygote of the handles.

    Attributes:
        children: those that were started.
        tree: these, and all descendants that run :mod:`.bootstrap`, which report themselves.
        origins: how each of these came to be, by pid: "forked" or "spawned".
        families: name of the child that each of these is, or descends from, by pid.
        lost: a sentence for each descendant that ended with an error, as its parent reported it.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        initializer: Callable[[], None] | None = None,
        on_start: Callable[[str], None] = lambda name: None,
        tail: OutputTail | None = None,
        on_report: Callable[[str], None] = lambda message: None,
        handles: InheritedHandles | None = None,
        find_zygote: FindZygote | None = None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_loss = on_loss
        self.environment = dict(environment)
        self.initializer = initializer
        self.on_start = on_start
        self.tail = tail
        self.on_report = on_report
        self.handles = handles or bootstrap.inherited_handles()
        self.find_zygote = find_zygote
        self.children: list[EngineProcess] = []
        self.outputs: list[ChildOutput] = []
        self.tree = ProcessTree()
        self.origins: dict[int, str] = {}
        self.families: dict[int, str] = {}
        self.lost: list[str] = []
        self._stacks = StackReader()
        self._sealed = threading.Event()
        self._lock = threading.Lock()

    def Process(self, *args: Any, **kwargs: Any) -> EngineProcess:  # type: ignore[override]  # noqa: N802
        return EngineProcess(self, *args, **kwargs)

    def get_context(self, method: str | None = None) -> EngineContext:  # type: ignore[override]
        """This context, for every start method."""
        return self

    def seal(self) -> None:
        """Refuse to start further children; those that were started are in ``children``."""
        self._sealed.set()
        with self._lock:  # a start in flight gives up, or is in ``children`` by now
            pass

    def await_output(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the last lines of children that have ended."""
        deadline = time.monotonic() + timeout
        for output in self.outputs:
            output.join(max(0.0, deadline - time.monotonic()))

    def launch(self, process: EngineProcess, start: Callable[[], None]) -> None:
        """Start ``process`` and remember it, unless this context is sealed.

        Raises:
            RuntimeError: the context is sealed.
        """
        with self._lock:
            self._refuse_if_sealed(process)
            start()
            popen = process._popen  # a stop may replace it once the lock is free
            self.children.append(process)
            self.tree.record([process.pid])  # or a stop that comes now would not kill it
        if not popen.send_call(self._sealed):  # type: ignore[union-attr]  # unlocked: the child may never read
            self._refuse_if_sealed(process)
        self.on_start(process.name)

    def _refuse_if_sealed(self, process: EngineProcess) -> None:
        if self._sealed.is_set():
            raise RuntimeError(f"{process.name} was not started: the engine is being stopped")

    def make(self, process: EngineProcess) -> Popen:
        """Fork ``process`` from the zygote, or spawn it."""
        setup = process.setup
        if setup.handles.zygote is not None:
            try:
                return ZygotePopen(process, setup.environment, setup.handles.zygote, self._sealed)
            except ZygoteUnavailableError as reason:
                self._refuse_if_sealed(process)
                logger.warning("%s is spawned, not forked from the zygote: %s", process.name, reason)
            process.setup = replace(setup, handles=replace(setup.handles, zygote=None))
        return SpawnPopen(process, setup.environment)

    def zygote(self, name: str) -> ZygoteClient | None:
        """The zygote to fork the process ``name`` from; None to spawn it."""
        try:
            return self.find_zygote() if self.find_zygote is not None else self.handles.zygote
        except ZygoteUnavailableError as reason:
            logger.warning("%s is spawned, not forked from the zygote: %s", name, reason)
            return None

    def heard(self, message: str, child: str = "") -> None:
        """Handle a report of a descendant.

        Args:
            child: name of the child that it is, or descends from.
        """
        if message.startswith(bootstrap.PID_REPORT):
            pid, *rest = message.removeprefix(bootstrap.PID_REPORT).split(" ", 3)
            self.families[int(pid)] = child
            self._started(pid, *rest)
        elif message.startswith(EXIT_REPORT):
            self.lost.append(message.removeprefix(EXIT_REPORT))
            self.on_loss()
        else:
            self.on_report(message)

    def _started(self, pid: str, how: str, fd: str = "", name: str = "") -> None:
        self.tree.record([int(pid)])
        self.origins[int(pid)] = how
        if fd:
            self._stacks.add(int(pid), int(fd), name)

    def stacks(self, timeout: float = 1.0) -> list[Stack]:
        """What each process is doing, as far as it says so within ``timeout`` seconds; needs ``tail``.

        Asks all processes that run :mod:`.bootstrap` at once. Blocks, and never raises. To be asked of an engine that
        hangs: see :mod:`.stacks`.
        """
        return self._stacks.read(timeout)


class EngineProcess(SpawnProcess):
    """A process that runs its target through :func:`.bootstrap.run`."""

    setup: ChildSetup
    _popen: Popen | None
    was_forked = False  #: whether it was forked by the zygote; False if it was spawned, or not started

    def __init__(
        self,
        context: EngineContext,
        group: None = None,
        target: Callable[..., Any] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        super().__init__(group, bootstrap.run, name, daemon=daemon)
        self._call = _Nested((context.initializer, target, tuple(args), dict(kwargs or {})))
        self._context = context

    def start(self) -> None:
        """Start the process; returns as soon as it runs, before it has imported anything."""
        assert "_context" in vars(self), "cannot start a process twice"
        context = self._context
        occupy_standard_streams()
        with contextlib.ExitStack() as stack:
            output = readers = None
            handles = replace(context.handles, zygote=context.zygote(self.name))
            if context.tail is not None:
                read_output, output = Pipe(duplex=False)
                read_reports, reports = Pipe(duplex=False)
                stack.callback(output.close)
                stack.callback(reports.close)
                handles = replace(handles, reports=reports)
                heard = functools.partial(context.heard, child=self.name)
                readers = ChildOutput(self.name, read_output, read_reports, context.tail, heard)
            # All variables, as this thread sees them: the zygote has others.
            self.setup = ChildSetup({**os.environ, **context.environment}, handles, output)
            try:
                context.launch(self, super().start)
            except BaseException:
                if readers is not None:
                    readers.close()
                raise
            finally:
                del self._context, self._call, self.setup  # they and we would keep each other alive
        if readers is not None:
            readers.start()
            context.outputs.append(readers)
        else:
            announce_exit(self)

    def release(self) -> None:
        """Close the files by which the process is watched, if it has ended; its exit code stays known."""
        if self._popen is not None and self.exitcode is not None:
            self._popen = EndedPopen(self._popen)

    def _Popen(self, process: EngineProcess) -> Popen:  # type: ignore[override]  # noqa: N802
        popen = self._context.make(process)
        self.was_forked = isinstance(popen, ZygotePopen)
        return popen

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        exit_code = super()._bootstrap(parent_sentinel)  # type: ignore[misc]
        bootstrap.exit_fast(exit_code)

    def __getstate__(self) -> dict[str, Any]:
        """What the child gets: not the context."""
        state = {name: value for name, value in vars(self).items() if name not in ("_context", "_call", "setup")}
        return state | {"_args": (self.setup, self._call)}


class _Nested:
    """Pickles to the pickle of its value, made at the moment the process starts."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        # Inside Popen's own dump, so that locks, queues and connections still find the child to be handed to.
        return bytes, (bytes(ForkingPickler.dumps(self.value)),)
