"""The multiprocessing context that engine processes are started from.

Always spawn: no lock is inherited from a parent that has threads. Each child runs :mod:`.bootstrap` first; its target
and arguments travel as one nested blob, so that they are unpickled after the environment is set and so that
``Process.start()`` does not wait for the child's imports.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Pipe
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from . import bootstrap
from .exits import announce_exit
from .output import ChildOutput, OutputTail


class EngineContext(SpawnContext):
    """Starts engine processes and remembers them.

    Args:
        environment: variables that every child sets before it imports anything.
        initializer: importable function that a child calls after its environment is set, before its target.
        on_start: called with the name of each child that was started.
        tail: where the output of the children and of their descendants is kept; None lets them inherit ours.
        on_report: called with each message that a child or descendant sends by :func:`.bootstrap.report`, on a
            thread of this context; needs ``tail``.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        initializer: Callable[[], None] | None = None,
        on_start: Callable[[str], None] = lambda name: None,
        tail: OutputTail | None = None,
        on_report: Callable[[str], None] | None = None,
    ) -> None:
        self.environment = dict(environment)
        self.initializer = initializer
        self.on_start = on_start
        self.tail = tail
        self.on_report = on_report
        self.children: list[EngineProcess] = []
        self.outputs: list[ChildOutput] = []
        self._sealed = False
        self._lock = threading.Lock()

    def Process(self, *args: Any, **kwargs: Any) -> EngineProcess:  # type: ignore[override]  # noqa: N802
        return EngineProcess(self, *args, **kwargs)

    def get_context(self, method: str | None = None) -> EngineContext:  # type: ignore[override]
        """Whatever method is asked for, this context is the answer."""
        return self

    def seal(self) -> None:
        """From now on no child can be started, whoever tries; those that were started are in ``children``."""
        with self._lock:
            self._sealed = True

    def await_output(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the last lines of children that have ended."""
        deadline = time.monotonic() + timeout
        for output in self.outputs:
            output.join(max(0.0, deadline - time.monotonic()))

    def launch(self, process: EngineProcess, start: Callable[[], None]) -> None:
        """Start ``process`` and remember it, unless this context was sealed.

        Raises:
            RuntimeError: the context was sealed.
        """
        with self._lock:
            if self._sealed:
                raise RuntimeError(f"{process.name} was not started: the engine is being stopped")
            start()
            self.children.append(process)
        self.on_start(process.name)


class EngineProcess(SpawnProcess):
    """A spawned process that runs its target through :func:`.bootstrap.run`."""

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
        call = _Nested((context.initializer, target, tuple(args), dict(kwargs or {})))
        super().__init__(group, bootstrap.run, name, daemon=daemon)
        self._context = context
        self._call = call

    def start(self) -> None:
        """Start the process; returns as soon as it runs, before it has imported anything."""
        assert "_context" in self.__dict__, "cannot start a process twice"
        context, call = self.__dict__.pop("_context"), self.__dict__.pop("_call")  # not for the child to have
        with contextlib.ExitStack() as stack:
            output = reports = None
            readers = None
            if context.tail is not None:
                read_output, output = Pipe(duplex=False)
                read_reports, reports = Pipe(duplex=False)
                stack.callback(output.close)
                stack.callback(reports.close)
                readers = ChildOutput(self.name, read_output, read_reports, context.tail, context.on_report)
            else:
                reports = bootstrap.reports()
            setup = bootstrap.ChildSetup(context.environment, output, reports)
            self._args = (setup, call)
            try:
                context.launch(self, super().start)
            except BaseException:
                if readers is not None:
                    readers.close()
                raise
        if readers is not None:
            readers.start()
            context.outputs.append(readers)
        else:
            announce_exit(self)


class _Nested:
    """Pickles to the pickle of its value, made at the moment the process starts."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        # Inside Popen's own dump, so that locks, queues and connections still find the child to be handed to.
        return bytes, (bytes(ForkingPickler.dumps(self.value)),)
