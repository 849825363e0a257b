"""The worker finds model processes that hang, and kills them; Xinference then launches the model again.

A model process finds hangs of its engine, and nobody but its worker can find its own. The worker asks the event loop of
each for a heartbeat. One that answers none for ``hang_timeout`` and does no work meanwhile hangs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import psutil

from ..engine.health import HangClock, Workload
from ..engine.seams.seam import Seam
from ..engine.watch import busy_factor
from ..errors import BadLaunchArgumentError
from ..process.stacks import Stack, StackReader
from ..settings import Settings
from . import across, replica_log
from .cluster_link import WorkerLink
from .launched import is_driver, is_of_ours, spans_workers

logger = logging.getLogger("xinference.vllm_backend")

READY = Seam(
    "xinference.core.worker",
    "WorkerActor.wait_for_load",
    "finding model processes that hang",
    "one that hangs is never ended, nor are its requests",
)
END = Seam("xinference.core.worker", "WorkerActor.__pre_destroy__", READY.used_for, READY.without)
MODELS = Seam(
    "xinference.core.worker",
    "WorkerActor",
    READY.used_for,
    READY.without,
    members=("_model_uid_to_launch_args", "_model_uid_to_model", "_model_uid_to_model_status", "_model_uid_to_pid"),
)
SEAMS = (READY, END, MODELS)

INTERVAL = 2.0  # seconds between two heartbeats
LOOKS = 4  # at least so many in hang_timeout, where that is short
STACKS_TIMEOUT = 1.0  # seconds that a process has to show its stacks
# While a model is stopped it is watched too, or it could not be stopped while it hangs.
WATCHED = ("ready", "stopping")


def install() -> None:
    """Have this process, if it is a worker's, watch the model processes of our models; idempotent."""
    if READY.module not in sys.modules or not all(seam.present() for seam in SEAMS):
        return
    READY.wrap(_watching)
    END.wrap(_ending)


def _watching(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def wait_for_load(worker: Any, model_uid: str) -> Any:
        answer = await original(worker, model_uid)
        launch_args = worker._model_uid_to_launch_args.get(model_uid, {})
        if is_of_ours(**launch_args):
            watches.begin(worker, model_uid)
            if spans_workers(**launch_args) and is_driver(**launch_args):
                await across.show(worker, model_uid, across.READY)
        return answer

    return wait_for_load


def _ending(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(original)
    async def pre_destroy(worker: Any) -> None:
        watches.end_all()
        await original(worker)

    return pre_destroy


class Watches:
    """The watches over the model processes of this worker, one for each replica."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._settings: dict[str, Settings] = {}

    def begin(self, worker: Any, model_uid: str) -> None:
        """Watch a model that has just become ready."""
        self.end(model_uid)
        model, pid = worker._model_uid_to_model.get(model_uid), worker._model_uid_to_pid.get(model_uid)
        if model is None or pid is None:
            return
        self._settings.setdefault(model_uid, _settings_given(worker._model_uid_to_launch_args.get(model_uid, {})))
        try:
            process = ModelProcess(pid, f"Model: {model_uid}")
        except psutil.NoSuchProcess:  # Xinference looks for that
            return
        watch = Watch(Replica(worker, model_uid, model), process)
        self._tasks[model_uid] = asyncio.get_running_loop().create_task(self._run(model_uid, watch))

    async def begin_generation(self, worker: Any, model_uid: str, address: str, uid: bytes) -> None:
        """Watch the process at ``address`` too, in which the model actor ``uid`` serves after a reload."""
        import xoscar as xo

        pool = worker._main_pool.sub_processes[address]
        model = await xo.actor_ref(address=address, uid=uid)
        watch = Watch(Generation(worker, model_uid, model), ModelProcess(pool.pid, f"Model: {model_uid}"))
        key = f"{model_uid} at {address}"
        self._tasks[key] = asyncio.get_running_loop().create_task(self._run(model_uid, watch))
        self._tasks[key].add_done_callback(lambda _: self._tasks.pop(key, None))

    def end(self, model_uid: str) -> None:
        """Stop watching, if it is watched."""
        task = self._tasks.pop(model_uid, None)
        if task is not None:
            task.cancel()

    def end_all(self) -> None:
        for model_uid in list(self._tasks):
            self.end(model_uid)

    def settings(self, model_uid: str) -> Settings:
        """The settings of the model: as its process told them, until then as the launch gives them, or the defaults."""
        return self._settings.get(model_uid, Settings())

    def forget(self, model_uid: str) -> None:
        """Drop what is known of a replica that is gone for good."""
        self.end(model_uid)
        self._settings.pop(model_uid, None)

    async def _run(self, model_uid: str, watch: Watch) -> None:
        try:
            await watch.until_gone(functools.partial(self._settings.__setitem__, model_uid))
        except Exception:  # the model serves on, unwatched
            logger.exception("The model process of %s is not watched any more", model_uid)


watches = Watches()


def _settings_given(launch_arguments: Mapping[str, Any]) -> Settings:
    """Those of a launch, without what its own environment gives."""
    try:
        return Settings.resolve(Settings.options_in(dict(launch_arguments)))
    except BadLaunchArgumentError:  # a variable of this process that the launch's own replaces
        return Settings()


class Watched(Protocol):
    """A replica, as its :class:`Watch` needs it."""

    uid: str

    def is_there(self) -> bool:
        """Whether it is the model that was watched from the start, and not one that was launched since."""

    def is_watched(self) -> bool:
        """Whether its process has to answer now."""

    async def heartbeat(self) -> Mapping[str, Any]:
        """Ask its process; may never return."""

    async def announce(self, text: str) -> None: ...


class Replica:
    """One replica in its worker."""

    def __init__(self, worker: Any, uid: str, model: Any) -> None:
        self.uid = uid
        self._worker = worker
        self._model = model

    def is_there(self) -> bool:
        return self._worker._model_uid_to_model.get(self.uid) is self._model

    def is_watched(self) -> bool:
        return getattr(self._worker._model_uid_to_model_status.get(self.uid), "model_state", "") in WATCHED

    async def heartbeat(self) -> Mapping[str, Any]:
        from xoscar.errors import ServerClosed

        try:
            answer: Mapping[str, Any] = await self._model.heartbeat()
        except ServerClosed as error:
            raise ConnectionError(str(error)) from None
        return answer

    async def announce(self, text: str) -> None:
        await WorkerLink(self._worker, self.uid).announce(text, error=True)


class Generation(Replica):
    """A replica in the process that serves after a reload; it ends with its sub-pool."""

    def is_there(self) -> bool:
        return self._model.address in self._worker._model_uid_to_subpool_addresses.get(self.uid, ())

    def is_watched(self) -> bool:
        return True


class ModelProcess:
    """A model process, seen from outside; all methods block.

    Args:
        pid: of the process.
        title: its name.
    """

    def __init__(self, pid: int, title: str) -> None:
        self._pid = pid
        self._title = title
        self._process = psutil.Process(pid)
        self._stacks = StackReader()

    @property
    def pid(self) -> int:
        return self._pid

    def shows_stacks_by(self, fd: int) -> None:
        """Remember by which of its files it shows its stacks."""
        self._stacks.add(self._pid, fd, self._title)

    def look(self) -> tuple[bool, float]:
        """Whether it is stopped, as by SIGSTOP, and the seconds of CPU that it has used itself.

        Raises:
            psutil.NoSuchProcess: it has ended.
        """
        times = self._process.cpu_times()
        return self._process.status() == psutil.STATUS_STOPPED, times.user + times.system

    def stacks(self) -> list[Stack]:
        return self._stacks.read(STACKS_TIMEOUT)

    def kill(self) -> None:
        self._process.kill()


class Watch:
    """Asks one model process for heartbeats until it is gone, and kills it if it hangs.

    Args:
        replica: whose process it is.
        process: the same, from outside.
        interval: seconds between two heartbeats.
        clock: seconds.
    """

    def __init__(
        self,
        replica: Watched,
        process: ModelProcess,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica = replica
        self._process = process
        self._longest_interval = interval
        self._now = clock
        self._workload = Workload(clock)
        self._beat: asyncio.Task[None] | None = None
        self._knows_stacks = False
        self._apply(Settings(), busy_factor(Settings()))

    async def until_gone(self, on_settings: Callable[[Settings], None] = lambda settings: None) -> None:
        """Return when the replica is gone, or its process was killed.

        Args:
            on_settings: called with the settings of the model when its process has told them.
        """
        self._on_settings = on_settings
        # Of its own, so that no other work of the worker can keep a look waiting.
        self._thread = ThreadPoolExecutor(1, "model-process-look")
        try:
            while self._replica.is_there() and not (await self._hangs() and await self._ended()):
                pass
        except psutil.NoSuchProcess:
            pass  # Xinference looks for that
        finally:
            if self._beat is not None:
                self._beat.cancel()
            self._thread.shutdown(wait=False)

    async def _hangs(self) -> bool:
        if self._beat is None:
            self._beat = asyncio.ensure_future(self._ask())
            self._beat.add_done_callback(_retrieve)
        await asyncio.sleep(self._interval)
        if self._answered() or not self._replica.is_watched():
            self._clock.heard()
            return False
        self._halted, used = await self._in_thread(self._process.look)
        works = self._workload.works({}, {self._process.pid: used}) and not self._halted
        return self._clock.look(works)

    def _answered(self) -> bool:
        """Whether the process has answered the last question; then another may be asked."""
        if self._beat is None or not self._beat.done():
            return False
        beat, self._beat = self._beat, None
        return not isinstance(beat.exception(), (OSError, EOFError))  # any other error is its answer

    async def _ask(self) -> None:
        told = await self._replica.heartbeat()
        settings = Settings(**told["settings"])
        if settings != self._settings:
            self._apply(settings, told["busy_factor"])
        self._on_settings(settings)
        if not self._knows_stacks and told["stacks"] is not None:
            self._process.shows_stacks_by(told["stacks"])
            self._knows_stacks = True

    def _apply(self, settings: Settings, busy_factor: float) -> None:
        self._settings = settings
        self._interval = min(self._longest_interval, settings.hang_timeout / LOOKS)
        self._clock = HangClock(settings.hang_timeout, busy_factor, self._interval, self._now)

    async def _ended(self) -> bool:
        """Kill the process, and tell why; False where it answered meanwhile, or is gone."""
        stacks = await self._in_thread(self._process.stacks)
        if self._answered() or not self._replica.is_there():
            self._clock.heard()
            return False
        reason = self._reason()
        shown = "".join(f"\n{stack.title} (pid {stack.pid}):\n{stack.text}" for stack in stacks)
        logger.error("%s\nStacks:%s", reason, shown or " it does not show them.")
        await self._replica.announce(reason)  # this task may be cancelled once the process has ended
        details = {"stacks": list(map(dataclasses.asdict, stacks)), "requests": []}
        replica_log.record_from_outside(self._replica.uid, reason, details)
        await self._in_thread(self._process.kill)
        return True

    def _reason(self) -> str:
        if self._halted:
            why = "answered nothing, and it is stopped, as by SIGSTOP"
        elif self._clock.silent < self._clock.unanswered:
            why = "answered nothing, though it has worked"
        else:
            why = "answered nothing and done no work"
        return (
            f"The model process of {self._replica.uid} (pid {self._process.pid}) hangs: for "
            f"{self._clock.unanswered:.0f} s it has {why}. It is killed, and Xinference launches the model again."
        )

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _retrieve(beat: asyncio.Future[Any]) -> None:
    """Have asyncio not complain of an error that nobody waits for any more."""
    if not beat.cancelled():
        beat.exception()
