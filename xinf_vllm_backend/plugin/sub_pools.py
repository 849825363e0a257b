"""How a worker starts model processes: out of a host zygote, and where that cannot be as Xinference does.

xoscar starts each sub-pool by one function, which does not know for what it is. So the launch of a model of ours is
marked for the tasks that it runs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from multiprocessing import resource_tracker
from typing import Any

import psutil

from ..engine.seams import platform
from ..engine.seams.seam import Seam
from ..errors import BadLaunchArgumentError
from ..process.zygote.client import ZygoteUnavailableError
from ..process.zygote.host import CommandPopen, HostZygote
from ..process.zygote.server import TITLE
from ..settings import HostSettings, variable
from . import across, model_process
from .launched import is_of_ours, spans_workers

logger = logging.getLogger("xinference.vllm_backend")

SUB_POOL = Seam(
    "xoscar.backends.indigen.pool",
    "create_subprocess_exec",
    "forking model processes from the host zygote",
    "each imports Xinference and vLLM itself",
)
HANDLE = Seam("xoscar.backends.indigen.handoff", "SubPoolProcess.spawned", SUB_POOL.used_for, SUB_POOL.without)
LAUNCH = Seam(
    "xinference.core.worker",
    "WorkerActor.launch_builtin_model",
    "telling model processes of ours from others",
    "each imports Xinference and vLLM itself",
)
RANK0 = Seam(
    "xinference.core.worker",
    "WorkerActor.launch_rank0_model",
    "forking the process that a Xavier cache has beside its replicas",
    "it imports Xinference and vLLM itself before the replicas are launched",
)
CANCEL = Seam(
    "xinference.core.worker",
    "WorkerActor.cancel_launch_model",
    "stopping a model whose launch was over when it was cancelled",
    "it runs on, and can be neither reached nor terminated",
)
LAUNCHED = Seam("xinference.core.worker", "WorkerActor._model_uid_to_launch_args", CANCEL.used_for, CANCEL.without)
FORKING = (SUB_POOL, HANDLE, LAUNCH)
CANCELLING = (CANCEL, LAUNCHED)
SEAMS = (*FORKING, RANK0, *CANCELLING)

# What Xinference gives a model process whose Python is another.
_OF_THE_PYTHON = frozenset(
    {
        "PATH",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "PYTHONHOME",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "CONDA_DEFAULT_ENV",
        "FLASHINFER_NINJA_PATH",
    }
)

SHARED_MEMORY_OPTION = "-sn"  # of the command line of a sub-pool, before the name of its shared memory

# Of a launch of a model of ours: the shared memory by which its sub-pools are started. None of any other.
_launching: ContextVar[list[str] | None] = ContextVar("shared memory of a launch of ours", default=None)
_zygotes: HostZygotes | None = None
_lock = threading.Lock()


def install() -> None:
    """Have this process, if it is a worker's, fork the model processes of our models; idempotent."""
    if LAUNCH.module not in sys.modules:
        return
    if LAUNCH.wrap(_marking):
        SUB_POOL.wrap(_forking)
        RANK0.wrap(_forked_always)
    if LAUNCHED.present():
        CANCEL.wrap(_stopping)


def start_host_zygote() -> None:
    """Start the host zygote of this worker, on a thread; idempotent."""
    threading.Thread(target=_zygotes_of_worker().start, name="host-zygote-start", daemon=True).start()


def _zygotes_of_worker() -> HostZygotes:
    global _zygotes
    with _lock:
        if _zygotes is None:
            _zygotes = HostZygotes(_settings())
        return _zygotes


def _settings() -> HostSettings:
    try:
        return HostSettings.resolve()
    except BadLaunchArgumentError as error:  # no reason for a worker not to start
        logger.error("Model processes are spawned: %s", error)
        return HostSettings(host_zygote="off")


def why_spawned() -> str | None:
    """Why a worker of this host would fork no model process, whatever the launch; None if it would."""
    gone = [seam.name for seam in FORKING if not seam.present()]
    if gone:
        return f"there is no {', '.join(gone)}"
    return None if _settings().host_zygote == "on" else f"{variable('host_zygote')} is off"


def running_host_zygotes() -> list[psutil.Process]:
    """The host zygotes of all workers on this host."""
    return [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or ()).strip() == TITLE]


class HostZygotes:
    """The host zygotes of a worker: one for its own Python, and some for those of virtual environments."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._own: HostZygote | None = None
        self._others: OrderedDict[str, HostZygote] = OrderedDict()  # by Python, the least used first

    def start(self) -> None:
        """Start the one of this worker's own Python, once."""
        if self._settings.host_zygote == "on":
            with contextlib.suppress(ZygoteUnavailableError):  # said when it is asked for
                self._of_this_python()

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], blocked: set[int], cancelled: threading.Event
    ) -> CommandPopen:
        """Fork a child of this process that runs ``command``; see :class:`.CommandPopen`.

        Raises:
            ZygoteUnavailableError: there is no child; the message says why.
        """
        python, option, *_ = command
        if self._settings.host_zygote == "off":
            raise ZygoteUnavailableError(f"{variable('host_zygote')} is off")
        if option != "-m":
            raise ZygoteUnavailableError(f"it is to be run by {python}")
        zygote = self._of_this_python() if python == sys.executable else self._of(python, environment)
        return CommandPopen(zygote, command, environment, blocked, cancelled)

    def _of_this_python(self) -> HostZygote:
        if not platform.is_installed():
            raise ZygoteUnavailableError("vLLM is not installed for the Python of the worker")
        with self._lock:
            if self._own is None:
                self._own = _started(sys.executable, os.environ)
            return self._own

    def _of(self, python: str, environment: Mapping[str, str]) -> HostZygote:
        if not self._settings.host_zygotes:
            raise ZygoteUnavailableError(f"{variable('host_zygotes')} is 0, and it is to be run by {python}")
        with self._lock:
            if python in self._others:
                self._others.move_to_end(python)
                return self._others[python]
            while len(self._others) >= self._settings.host_zygotes:
                self._others.popitem(last=False)[1].stop()
            own = {name: value for name, value in environment.items() if name in _OF_THE_PYTHON}
            self._others[python] = _started(python, {**os.environ, **own}, patient=False)
        raise ZygoteUnavailableError(f"the first launch with {python} has its zygote started")


def _started(python: str, environment: Mapping[str, str], patient: bool = True) -> HostZygote:
    # The first is what its engines begin with. The second has torch count devices without initialising them.
    own = {**platform.ld_preload(), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    zygote = HostZygote(python, environment, own, *model_process.ENTRY_POINTS, patient)
    try:
        zygote.start()
    except OSError as error:
        raise ZygoteUnavailableError(f"it could not be started: {error}") from None
    return zygote


@contextlib.contextmanager
def forking(is_ours: bool = True) -> Iterator[None]:
    """Fork the sub-pools that are started in this context from the host zygote, where ``is_ours``."""
    shared_memory: list[str] | None = [] if is_ours else None
    token = _launching.set(shared_memory)
    try:
        yield
    finally:
        _launching.reset(token)
        for name in shared_memory or ():
            resource_tracker.unregister(name, "shared_memory")


def _marking(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def launched(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        is_ours = is_of_ours(**given.arguments)
        with forking(is_ours):
            answer = await original(*args, **kwargs)
        if is_ours and spans_workers(**given.arguments):
            await across.show(given.arguments["self"], given.arguments["model_uid"], across.LOADING)
        return answer

    return launched


def _forked_always(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def launched(*args: Any, **kwargs: Any) -> Any:
        with forking():
            return await original(*args, **kwargs)

    return launched


def _stopping(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Xinference forgets a model whose launch is cancelled, also one that was launched the moment before."""

    @functools.wraps(original)
    async def cancelled(worker: Any, model_uid: str) -> Any:
        try:
            return await original(worker, model_uid)
        except RuntimeError:
            if not is_of_ours(**worker._model_uid_to_launch_args.get(model_uid, {})):
                raise
        logger.warning("The model %s is stopped: its launch was over when it was cancelled", model_uid)
        await worker.terminate_model(model_uid)

    return cancelled


def _forking(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def created(*command: str, env: Mapping[str, str], **others: Any) -> Any:
        shared_memory = _launching.get()
        if shared_memory is None:
            return await original(*command, env=env, **others)
        shared_memory.extend(_tracked(command))
        try:
            return HANDLE.owner().spawned(await _forked(command, env))
        except ZygoteUnavailableError as reason:
            logger.warning("The model process is spawned, not forked from the host zygote: %s", reason)
            return await original(*command, env={**env, model_process.SPAWNED_BECAUSE: str(reason)}, **others)

    return created


def _tracked(command: Sequence[str]) -> list[str]:
    """The shared memory of a sub-pool, which is removed from now on if the worker is killed; xoscar leaves it then."""
    names = [f"/{name}" for option, name in itertools.pairwise(command) if option == SHARED_MEMORY_OPTION]
    for name in names:
        resource_tracker.register(name, "shared_memory")
    return names


async def _forked(command: Sequence[str], environment: Mapping[str, str]) -> CommandPopen:
    if not HANDLE.present():
        raise ZygoteUnavailableError(f"xoscar has no {HANDLE.name}")
    # As xoscar's own children: Ctrl-C is for the worker.
    blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()) | {signal.SIGINT}}
    cancelled = threading.Event()
    forking = asyncio.ensure_future(
        asyncio.to_thread(_zygotes_of_worker().fork, command, environment, blocked, cancelled)
    )
    try:
        return await asyncio.shield(forking)
    except asyncio.CancelledError:
        cancelled.set()
        forking.add_done_callback(_discard)
        raise


def _discard(forking: asyncio.Future[CommandPopen]) -> None:
    """End the process of a launch that was cancelled while it was forked."""
    if not forking.cancelled() and forking.exception() is None:
        process = forking.result()
        process.kill()
        threading.Thread(target=process.wait, name="reap-model-process", daemon=True).start()
