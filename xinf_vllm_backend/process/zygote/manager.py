"""Starts a zygote, watches it, replaces it when it dies, and ends it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import Pipe, util
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol

from .. import popen
from . import client
from .client import ZygoteClient, ZygoteUnavailableError, frozen
from .server import serve

logger = logging.getLogger(__name__)


class ZygoteProcess(Protocol):
    """The process of a zygote."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def start(self) -> None: ...
    def send_call(self, cancelled: threading.Event) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...


STOP_TIMEOUT = 5.0  # seconds
SOON = 10.0  # seconds; a zygote that ends before is a failure
MOST_DEATHS = 3  # failures in a row, after which there is no further zygote


class BaseZygote:
    """A zygote: made, watched, replaced when it dies, and ended.

    Args:
        environment: its environment; some variables its children cannot change (see :func:`frozen`).
        patient: whether it may be asked while it still imports for the first time.
    """

    def __init__(self, environment: Mapping[str, str], patient: bool = True) -> None:
        self._environment = dict(environment)
        self._patient = patient
        self._lock = threading.Lock()
        self._process: ZygoteProcess | None = None
        self._client: ZygoteClient | None = None
        self._why_not: str | None = "it was not started"  # None: ask the client
        self._stopped = threading.Event()
        self._at_exit: util.Finalize | None = None
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start it; it answers once it has imported all.

        Raises:
            OSError: there can be none.
        """
        ready = self._make(None if self._patient else "it still imports")
        # Else its end at our exit would be logged as a failure.
        self._at_exit = util.Finalize(None, self.stop, exitpriority=0)
        self._watcher = threading.Thread(target=self._watch, args=(ready,), name="zygote-watch", daemon=True)
        self._watcher.start()

    def client(self) -> ZygoteClient:
        """The client to ask for children.

        Raises:
            ZygoteUnavailableError: there is none now.
        """
        with self._lock:
            if self._client is None or self._why_not is not None:
                raise ZygoteUnavailableError(self._why_not)
            return self._client

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def stop(self) -> None:
        """End it, within 5 s; its children live on."""
        if self._at_exit is not None:
            self._at_exit.cancel()
        self._stopped.set()
        with self._lock:
            process = self._process
            self._withdraw("it was stopped")
        if process is not None:
            process.kill()
            process.join(STOP_TIMEOUT)
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT)

    def _make(self, why_not: str | None) -> Connection | None:
        ready, greeting = Pipe(duplex=False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = self._new_process(theirs, greeting)
        with self._lock, theirs, greeting:
            if self._stopped.is_set():
                ours.close()
                ready.close()
                return None
            self._client = ZygoteClient(ours, frozen(self._environment))
            self._why_not = why_not
            process.start()
            self._process = process
        return ready

    def _new_process(self, requests: socket.socket, ready: Connection) -> ZygoteProcess:
        """The process, not started yet.

        Args:
            requests: where it takes requests from.
            ready: where it says when it has imported all.
        """
        raise NotImplementedError

    def _watch(self, ready: Connection | None) -> None:
        early = 0
        while ready is not None:
            process = self._process
            assert process is not None
            made = time.monotonic()
            process.send_call(self._stopped)
            is_ready = self._is_ready(ready)
            process.join()
            too_soon = not is_ready or time.monotonic() - made < SOON
            early = early + 1 if too_soon else 0
            with self._lock:
                if self._stopped.is_set():
                    return
                self._withdraw("it has ended")
            logger.warning("The zygote (pid %s) ended with %s", process.pid, process.exitcode)
            if early >= MOST_DEATHS:
                logger.warning("No further zygote is made: the last %d ended too early", early)
                return
            try:
                ready = self._make("it is being replaced")
            except OSError as error:
                logger.warning("No further zygote can be made: %s", error)
                return

    def _is_ready(self, ready: Connection) -> bool:
        with ready, contextlib.suppress(EOFError, OSError):
            ready.recv_bytes()
            with self._lock:
                if not self._stopped.is_set():
                    self._why_not = None
            return True
        return False

    def _withdraw(self, why: str) -> None:
        client, self._client, self._why_not = self._client, None, why
        if client is not None:
            client.requests.close()


class Zygote(BaseZygote):
    """The zygote of this process, for calls: forked from the host zygote that forked this process, else spawned.

    Args:
        environment: its environment.
        preload: importable function that imports what the children need.
        hazard: importable function that says, before a fork and in the child after it, why that is not clean, or None.
    """

    def __init__(
        self, environment: Mapping[str, str], preload: Callable[[], None], hazard: Callable[[], str | None]
    ) -> None:
        # OpenBLAS, of NumPy and of SciPy, starts its threads when it is loaded.
        super().__init__({**environment, "OPENBLAS_NUM_THREADS": "1"})
        self._preload = preload
        self._hazard = hazard

    def _new_process(self, requests: socket.socket, ready: Connection) -> ZygoteProcess:
        return _EngineZygoteProcess(self._environment, self._stopped, requests, ready, self._preload, self._hazard)


class _EngineZygoteProcess(SpawnProcess):
    def __init__(self, environment: Mapping[str, str], cancelled: threading.Event, *args: object) -> None:
        # A daemon: else multiprocessing would wait at exit for a process that waits for our end.
        super().__init__(target=serve, args=(*args, popen.Alive()), name="Zygote", daemon=True)
        self._environment = environment
        self._cancelled = cancelled

    def _Popen(self, process: SpawnProcess) -> popen.SpawnPopen | popen.ZygotePopen:  # type: ignore[override]  # noqa: N802
        environment, cancelled = (self.__dict__.pop(name) for name in ("_environment", "_cancelled"))
        if client.host is not None:
            try:
                return popen.ZygotePopen(process, environment, client.host, cancelled)
            except ZygoteUnavailableError as reason:
                logger.warning("The zygote is spawned, not forked from the host zygote: %s", reason)
        return popen.SpawnPopen(process, environment)

    def send_call(self, cancelled: threading.Event) -> None:
        self._popen.send_call(cancelled)  # type: ignore[attr-defined]
