"""The zygote: a fresh process that imports what engine processes need, stays single-threaded, and forks them.

A fork is only clean from a process with one thread and no initialised accelerator: the zygote looks before each, and
refuses. Whoever is refused, or finds no zygote, spawns. The zygote forks for its model process and for the children
it forked, which hold the other end of its socket; it ends with the model process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, parent_process, spawn, util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from . import bootstrap, popen

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 60.0  # seconds; the first request may find the zygote still importing
POLL = 0.1  # seconds until one who waits for an answer sees that it was cancelled
STOP_TIMEOUT = 5.0  # seconds
SOON = 10.0  # seconds after which a zygote counts as one that works
MOST_DEATHS = 3  # in a row of such as did not work
MAX_FDS = 200  # the kernel passes at most 253 in one message

# Read when the process starts or a library is loaded, by the linker, the C library, OpenMP or BLAS, and never again.
_FROZEN = ("LD_PRELOAD", "PYTHONHASHSEED", "GLIBC_", "MALLOC_", "TCMALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_")
_MENDED = frozenset({"OMP_NUM_THREADS", "GOMP_CPU_AFFINITY"})  # by threads.settle
_HARMLESS = frozenset({"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})  # some libraries set them when imported


class ZygoteUnavailableError(Exception):
    """There is no child of the zygote; the text says why."""


def frozen(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that a process reads once, before it can be forked."""
    return {k: v for k, v in environment.items() if k.startswith(_FROZEN) and k not in _MENDED | _HARMLESS}


@dataclass(frozen=True)
class ZygoteClient:
    """One end of the socket to a zygote; may be handed to children of it, which then ask it themselves.

    Attributes:
        requests: the socket.
        frozen: what of its environment the zygote cannot change any more.
    """

    requests: socket.socket
    frozen: Mapping[str, str]

    def fork(
        self, environment: Mapping[str, str], data: int, alive: int, fds: Sequence[int], cancelled: threading.Event
    ) -> tuple[int, socket.socket]:
        """Have a child forked that runs what comes out of the pipe ``data``, and holds ``alive`` and ``fds``.

        Returns:
            Its pid, and the socket that gets its exit code once it has ended.

        Raises:
            ZygoteUnavailableError: the zygote refused, is gone, or did not answer within 60 s or until ``cancelled``.
        """
        executable = os.fsdecode(spawn.get_executable())
        if executable != sys.executable:  # numactl, say
            raise ZygoteUnavailableError(f"it is to be run by {executable}")
        differing = self.frozen.items() ^ frozen(environment).items()
        if differing:
            names = ", ".join(sorted({name for name, _ in differing}))
            raise ZygoteUnavailableError(f"it was loaded with other values of {names}")
        if len(fds) > MAX_FDS:
            raise ZygoteUnavailableError(f"{len(fds)} file descriptors cannot be passed to it")
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                message = [pickle.dumps(os.sched_getaffinity(0))]
                passed = [theirs.fileno(), data, alive, 1, 2, *fds]
                socket.send_fds(self.requests, message, passed, socket.MSG_DONTWAIT)
            deadline = time.monotonic() + ANSWER_TIMEOUT
            while not wait([status], POLL):
                if cancelled.is_set() or time.monotonic() > deadline:
                    raise ZygoteUnavailableError(f"it did not answer within {ANSWER_TIMEOUT:g} s")
            answer = status.recv(4096).decode()
            pid = answer.removeprefix("pid ")
            if pid == answer:
                raise ZygoteUnavailableError(answer or "it has ended")
            return int(pid), status
        except OSError as error:
            status.close()
            raise ZygoteUnavailableError(str(error)) from None
        except BaseException:
            status.close()
            raise


class Zygote:
    """The zygote of this process: made, watched, replaced when it dies, and ended.

    Args:
        environment: its environment, and so what its children cannot get changed any more (see :func:`frozen`).
        preload: importable function that imports what the children need.
        hazard: importable function that says why a fork would not be clean, or None.
    """

    def __init__(
        self, environment: Mapping[str, str], preload: Callable[[], None], hazard: Callable[[], str | None]
    ) -> None:
        # OpenBLAS, of NumPy and of SciPy, starts its threads when it is loaded.
        self._environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}
        self._preload = preload
        self._hazard = hazard
        self._lock = threading.Lock()
        self._process: _ZygoteProcess | None = None
        self._client: ZygoteClient | None = None
        self._why_not: str | None = "it was not started"  # None: ask the client
        self._stopped = False
        self._at_exit: util.Finalize | None = None
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start it; it answers once it has imported all.

        Raises:
            OSError: there can be none.
        """
        ready = self._make(None)
        # Or its end, which comes with ours, would be taken for an accident.
        self._at_exit = util.Finalize(None, self.stop, exitpriority=0)
        self._watcher = threading.Thread(target=self._watch, args=(ready,), name="zygote-watch", daemon=True)
        self._watcher.start()

    def client(self) -> ZygoteClient:
        """What to ask for children.

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
        with self._lock:
            self._stopped = True
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
        process = _ZygoteProcess(self._environment, theirs, greeting, self._preload, self._hazard)
        with self._lock, theirs, greeting:
            if self._stopped:
                ours.close()
                ready.close()
                return None
            self._client = ZygoteClient(ours, frozen(self._environment))
            self._why_not = why_not
            process.start()
            self._process = process
        return ready

    def _watch(self, ready: Connection | None) -> None:
        early = 0
        while ready is not None:
            process = self._process
            assert process is not None
            made = time.monotonic()
            is_ready = self._is_ready(ready)
            process.join()
            too_soon = not is_ready or time.monotonic() - made < SOON
            early = early + 1 if too_soon else 0
            with self._lock:
                if self._stopped:
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
                if not self._stopped:
                    self._why_not = None
            return True
        return False

    def _withdraw(self, why: str) -> None:
        client, self._client, self._why_not = self._client, None, why
        if client is not None:
            client.requests.close()


class _ZygoteProcess(SpawnProcess):
    def __init__(self, environment: Mapping[str, str], *args: object) -> None:
        # A daemon, or multiprocessing would wait for it when this process ends, and it for that.
        super().__init__(target=serve, args=(*args, popen.Alive()), name="Zygote", daemon=True)
        self._environment = environment

    def _Popen(self, process: SpawnProcess) -> popen.SpawnPopen:  # type: ignore[override]  # noqa: N802
        return popen.SpawnPopen(process, self.__dict__.pop("_environment"))


def serve(
    requests: socket.socket,
    ready: Connection,
    preload: Callable[[], None],
    hazard: Callable[[], str | None],
    alive: int,
) -> None:
    """What the zygote runs; returns when its model process has ended, and in each child when that has run."""
    parent = parent_process()
    assert parent is not None and parent.sentinel is not None
    bootstrap.kill_with(parent.sentinel)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who have something to end
    _name("xinf-vllm zygote")
    gc.disable()  # imports make objects to keep, and a frozen object's page stays shared with the children
    preload()
    gc.freeze()
    with ready:
        ready.send_bytes(b"ready")
    birth = _Server(requests, parent.sentinel, alive, hazard).run()
    if birth is not None:
        sys.exit(birth.live())


@dataclass(frozen=True)
class _Birth:
    """What a child was sent."""

    affinity: set[int]
    data: int
    streams: Sequence[int]
    fds: Sequence[int]

    def live(self) -> int:
        """Become what a spawned process is, and run; returns the exit code."""
        gc.enable()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # not all of these CPUs are ours
            os.sched_setaffinity(0, self.affinity)
        for fd, stream in zip((1, 2), self.streams, strict=True):
            os.dup2(stream, fd)
            os.close(stream)
        if "numpy" in sys.modules:  # the standard library's generator sees to that itself
            sys.modules["numpy"].random.seed()
        popen.inherited[:] = self.fds
        bootstrap.was_forked = True
        return spawn._main(self.data, os.dup(self.data))


class _Server:
    """Forks on request and tells how the children end."""

    def __init__(self, requests: socket.socket, parent: int, alive: int, hazard: Callable[[], str | None]) -> None:
        self._requests = requests
        self._parent = parent
        self._hazard = hazard
        self._children: dict[int, socket.socket] = {}  # by pid: who is told of their end
        self._wakeup, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds = (parent, alive, self._wakeup, wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # or nothing is written to the pipe
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def run(self) -> _Birth | None:
        """Serve until the parent has ended; in a child return at once, with what it was sent."""
        while True:
            signs = wait([self._parent, self._wakeup, self._requests])
            if self._parent in signs:
                return None
            if self._wakeup in signs:
                os.read(self._wakeup, 4096)
                self._reap()
            if self._requests in signs:
                birth = self._answer()
                if birth is not None:
                    return birth

    def _answer(self) -> _Birth | None:
        message, received, _, _ = socket.recv_fds(self._requests, 1 << 16, MAX_FDS + 8, socket.MSG_CMSG_CLOEXEC)
        if not received:  # nobody is left who could ask
            raise SystemExit
        status, fds = socket.socket(fileno=received[0]), received[1:]
        pid = self._fork(status)
        if pid == 0:
            status.close()
            self._leave()
            data, _alive, stdout, stderr, *others = fds  # alive is closed when the process ends
            return _Birth(pickle.loads(message), data, (stdout, stderr), others)
        for fd in fds:
            os.close(fd)
        if pid is None:
            status.close()
        else:
            self._children[pid] = status
            _tell(status, f"pid {pid}")
        return None

    def _fork(self, status: socket.socket) -> int | None:
        with contextlib.suppress(BlockingIOError):
            status.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return None  # nobody waits for an answer any more
        threads = len(os.listdir("/proc/self/task"))
        reason = f"it has {threads} threads" if threads > 1 else self._hazard()
        if reason is None:
            sys.stdout.flush()
            sys.stderr.flush()
            try:
                return os.fork()
            except OSError as error:
                reason = str(error)
        _tell(status, reason)
        return None

    def _leave(self) -> None:
        """What is the zygote's is not its child's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._requests.close()
        for status in self._children.values():
            status.close()
        for fd in self._fds:
            os.close(fd)

    def _reap(self) -> None:
        while self._children:
            pid, how = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            status = self._children.pop(pid, None)
            if status is not None:  # else what an import had started, and left to us
                with status:
                    _tell(status, str(os.waitstatus_to_exitcode(how)))


def _name(title: str) -> None:
    # At once: later, when the environment was changed, setproctitle no longer finds where titles of children go.
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)


def _tell(asker: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # it is gone, and needs no answer
        asker.send(message.encode()[:4000], socket.MSG_DONTWAIT)
