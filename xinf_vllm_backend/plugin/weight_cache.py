"""Xinference's weight cache: a daemon of vLLM's that keeps the weights on the GPU, from which engines take them.

The daemon is a child of the first model process of a replica, with a watcher that ends it with that process. No engine
owns it: it is there when one is restarted in place, and when another takes the place of this one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError
from typing import Any

from ..engine import diagnosis
from ..engine.lifecycle import State
from ..engine.pause import Stage
from ..engine.seams.seam import Seam
from ..errors import BadLaunchArgumentError, ControlError, EngineStartError
from ..process import environment
from ..process.cleanup import AtEnd
from ..settings import Settings
from .checkpoint import Checkpoint, Reading

logger = logging.getLogger("xinference.vllm_backend")

_TELLING = "telling one checkpoint in a weight cache from another"
_MISTAKEN = "an engine may be given the weights of a checkpoint that was overwritten"
DAEMON = Seam("xinference.model.llm.weight_cache", "WeightCacheDaemon", _TELLING, _MISTAKEN)
LEASE = Seam("xinference.model.llm.weight_cache", "BorrowedWeightCache", _TELLING, _MISTAKEN)
_COUNTING = "counting the memory of forked engine processes when a model is reloaded"
_NOT_COUNTED = "a model with a weight cache is not reloaded unless its engine processes are spawned"
MEMORY = Seam("xinference.model.llm.weight_cache", "_gpu_memory_snapshot", _COUNTING, _NOT_COUNTED)
CAPACITY = Seam("xinference.core.model_generation", "_check_generation_capacity", _COUNTING, _NOT_COUNTED)
FIELDS = Seam(
    "xinference.model.llm.weight_cache",
    "RELOAD_FIELDS",
    "requests that go on after a reload which changed how an engine runs",
    "each fails",
)
SEAMS = (DAEMON, LEASE, MEMORY, CAPACITY, FIELDS)

FAILED = "Weight cache daemon failed: "  # what Xinference says of its daemon, and then all that it printed
REMOVE_TIMEOUT = 2.0  # seconds until its directory is left to the janitor

_patience: ContextVar[float] = ContextVar("seconds that a daemon has to be ready", default=1800.0)
_engine_pids: ContextVar[frozenset[int]] = ContextVar("engine processes of this process", default=frozenset())


def install_in_model_process() -> None:
    """Have the daemons of this process know their checkpoints, and its engine processes be counted; idempotent."""
    DAEMON.wrap(_daemon)
    LEASE.wrap(_lease)
    if MEMORY.present() and CAPACITY.present():
        MEMORY.wrap(_with_forked)
        CAPACITY.wrap(_counting)


class _Knowing:
    """A weight cache that knows which checkpoint it holds."""

    checkpoint: Checkpoint | None = None

    def export(self) -> dict[str, Any]:
        found: dict[str, Any] = super().export()  # type: ignore[misc]
        return found | {"checkpoint": None if self.checkpoint is None else dataclasses.asdict(self.checkpoint)}


def _daemon(original: Any) -> Any:
    class Daemon(_Knowing, original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._removal = AtEnd(self.directory)

        def start(self, timeout: float | None = None, **kwargs: Any) -> None:
            begun, patience = time.monotonic(), min(timeout or _patience.get(), _patience.get())
            reading = Reading(self.model_path)
            try:
                super().start(patience, **kwargs)
            except BaseException:
                reading.stop()
                raise
            self.checkpoint = reading.result(max(0.0, begun + patience - time.monotonic()))

        def stop(self) -> None:
            try:
                super().stop()
            finally:
                self._removal.now(REMOVE_TIMEOUT)

    return Daemon


def _lease(original: Any) -> Any:
    class Lease(_Knowing, original):
        def __init__(self, descriptor: Mapping[str, Any]) -> None:
            super().__init__(descriptor)
            if (known := descriptor.get("checkpoint")) is not None:
                self.checkpoint = Checkpoint.parse(known)

    return Lease


def _counting(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def check(model: Any, *args: Any, **kwargs: Any) -> None:
        processes = model.engine_processes() if isinstance(model, Cached) else ()
        token = _engine_pids.set(frozenset(int(one["pid"]) for one in processes))
        try:
            original(model, *args, **kwargs)
        finally:
            _engine_pids.reset(token)

    return check


def _with_forked(original: Callable[[], dict[int, Any]]) -> Callable[[], dict[int, Any]]:
    @functools.wraps(original)
    def snapshot() -> dict[int, Any]:
        pids = _engine_pids.get()
        return {device: (total, free, as_own(used, pids)) for device, (total, free, used) in original().items()}

    return snapshot


def as_own(used: Mapping[int, int | None], pids: Iterable[int]) -> dict[int, int | None]:
    """``used`` with what ``pids`` use counted as this process's: to the kernel, forked ones are not its descendants.

    Args:
        used: bytes on a device by pid; None where the driver does not tell.
        pids: of engine processes of this one.
    """
    ours = [used[pid] for pid in {*pids, os.getpid()} if pid in used]
    if not ours:
        return dict(used)
    together = None if None in ours else sum(each or 0 for each in ours)
    return {pid: size for pid, size in used.items() if pid not in pids} | {os.getpid(): together}


class Cached:
    """A mixin for a model that may take its weights from a cache."""

    raw_model_uid: str
    model_path: str
    _enable_weight_cache = False
    _weight_cache: Any = None
    _engine: Any
    _settings: Settings
    _options: dict[str, Any]
    is_launched_again: bool

    def _prepare_weight_cache(self) -> None:
        """Start the daemon, if one was asked for and there is none; called by Xinference's ``load``.

        Raises:
            BadLaunchArgumentError: there can be none here.
            EngineStartError: it did not start, with the root cause.
        """
        token = _patience.set(self._settings.load_timeout)
        try:
            super()._prepare_weight_cache()  # type: ignore[misc]
        except PackageNotFoundError:
            raise BadLaunchArgumentError(
                "enable_weight_cache keeps weights on a GPU, and the installed vLLM is a build for CPUs; launch "
                "without it."
            ) from None
        except RuntimeError as error:
            raise EngineStartError(
                f"The weight cache of {self.raw_model_uid} failed to start: {_cause(error)}"
            ) from error
        finally:
            _patience.reset(token)

    def validate_reload(self, patch: dict[str, Any]) -> dict[str, Any]:
        """Xinference's, which configures an engine to see whether that can be; its variables stay on this thread."""
        with environment.private():
            config: dict[str, Any] = super().validate_reload(patch)  # type: ignore[misc]
        return config

    def checkpoint_and_rest(self, given: Iterable[tuple[str, str]]) -> tuple[Any, ...]:
        """The checksum of the checkpoint, where it is known, and those of ``given`` that no reload changes."""
        changed = FIELDS.owner().RELOAD_FIELDS["vllm"] if self._enable_weight_cache and FIELDS.present() else ()
        return self._checksum(), [(name, value) for name, value in given if name not in changed]

    def _checksum(self) -> str | None:
        checkpoint: Checkpoint | None = getattr(self._weight_cache, "checkpoint", None)
        return None if checkpoint is None else checkpoint.checksum

    def why_cache_is_gone(self) -> str:
        """Why no engine can take its weights from the daemon, a sentence; "" if one can, or none is used. Blocks."""
        if self._weight_cache is None:
            return ""
        try:
            self._weight_cache.client_config()
        except RuntimeError as error:
            return f"the daemon of its weight cache is gone ({error})"
        return ""

    def engine_processes(self) -> list[dict[str, Any]]:
        """Those of the engine that run."""
        return [] if self._engine is None else self._engine.processes()

    def why_not_replaced(self) -> str:
        """Why no other engine can take the place of this one now; "" if one can."""
        engine = self._engine
        if engine is None:
            return ""
        if engine.control.stage is not Stage.SERVING:
            return "it is paused; resume it first"
        if engine.lifecycle.state is not State.READY:
            return f"its engine is {engine.lifecycle.state.value}; reload it when it is {State.READY.value}"
        return ""

    def refuse_to_be_replaced(self) -> None:
        """Raise ControlError where :meth:`why_not_replaced` says why."""
        if why := self.why_not_replaced():
            raise ControlError(f"The model {self.raw_model_uid} cannot be reloaded: {why}.")

    async def holds_checkpoint(self) -> bool:
        """Whether the cache holds what the directory of the model does now; False if that is not known in time."""
        checkpoint: Checkpoint | None = getattr(self._weight_cache, "checkpoint", None)
        if checkpoint is None:
            return False
        stop = threading.Event()
        try:
            return await asyncio.wait_for(asyncio.to_thread(checkpoint.is_there, stop), self._settings.load_timeout)
        except asyncio.TimeoutError:
            logger.warning("The checkpoint of %s could not be read in time; it is loaded again", self.raw_model_uid)
            return False
        finally:
            stop.set()

    def options(self) -> dict[str, Any]:
        """Ours, of those that the launch gave."""
        return dict(self._options)

    def start_method(self) -> str:
        """The setting ``engine_start_method`` in force."""
        return str(self._settings.engine_start_method)

    def weight_cache_status(self) -> dict[str, Any] | None:
        """Pid of the daemon's watcher and the checksum of the checkpoint, as plain data; None without a cache."""
        cache = self._weight_cache
        if cache is None or cache.process is None:
            return None
        return {"pid": cache.process.pid, "checksum": self._checksum()}


def _cause(error: RuntimeError) -> str:
    before, failed, printed = str(error).partition(FAILED)
    if before or not failed:
        return diagnosis.describe(error)
    lines = printed.splitlines()
    return diagnosis.root_cause(lines) or diagnosis.last_words(lines) or "its daemon ended without a word."
