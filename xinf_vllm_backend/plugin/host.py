"""Chat models: the classes of Xinference that generate text, hosted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

from xinference.device_utils import gpu_count
from xinference.model.llm.vllm.core import VLLMModel

from ..engine import diagnosis
from ..engine.lifecycle import Move, State
from ..engine.seams import platform, start
from ..engine.supervisor import EngineSupervisor
from ..errors import EngineStartTimeoutError, EngineStoppedError
from ..settings import Settings
from . import across, cpu, engine_log, generations, launch_arguments, request_arguments, weight_cache, xavier
from .cluster_link import TELL_TIMEOUT
from .hosted import EXIT_STATUS, Hosted

logger = logging.getLogger("xinference.vllm_backend")

END_MARGIN = 30.0  # seconds beyond load_timeout in which our engine ends its start, kills included, and says why


class HostedModel(Hosted, weight_cache.Cached, VLLMModel):
    """A mixin for Xinference's vLLM classes of chat models.

    Of a model across several workers the first part runs the engine, and the others tell it where their ranks are.
    """

    def __init__(
        self, model_uid: str, model_family: Any, model_path: str, model_config: Any, peft_model: Any = None
    ) -> None:  # Xinference hands LoRA modules only to a class with a parameter of this very name
        arguments = {} if model_config is None else model_config
        options = self._options_in(arguments)
        given = frozenset(arguments)
        super().__init__(model_uid, model_family, model_path, arguments, peft_model)
        self._host(options, given)
        launch_arguments.refuse_unsupported(self._n_worker, self._get_xinference_executor_backend(), gpu_count())
        launch_arguments.refuse_sleep_across(self._n_worker, Settings.resolve(self._options), arguments)
        if self._cpu_host:
            self.model_family = cpu.without_vllm(self.model_family)

    def _directory(self) -> str:
        return str(self.model_path)

    # -- what this host offers

    @staticmethod
    def _has_cuda_device() -> bool:
        return platform.is_cpu_build() or VLLMModel._has_cuda_device()

    @staticmethod
    def _get_cuda_count() -> int:
        return 1 if platform.is_cpu_build() else VLLMModel._get_cuda_count()

    def _native_mp_route(self) -> tuple[bool, str]:
        if self._n_worker > 1 or self._xavier_config is not None:
            upstreams: tuple[bool, str] = super()._native_mp_route()
            return upstreams
        several = self._get_allocated_device_count() > 1
        return several, "several devices of one worker" if several else "one device"

    def _get_native_mp_parallelism(self) -> tuple[int, int]:
        return self._model_config["tensor_parallel_size"], self._model_config["pipeline_parallel_size"]

    def _runs_engine(self) -> bool:
        """Whether this is the part of the model that runs its engine."""
        return bool(self._shard == 0)

    def _ranks_elsewhere(self) -> bool:
        return bool(self._n_worker > 1)

    def _one_start(self) -> str:
        if self._ranks_elsewhere():
            return "its ranks are on several workers, and all of them have to be started with it"
        return "" if self._xavier_config is None else xavier.one_start(self._xavier_config)

    # -- load

    def load(self) -> None:
        """Load the engine on a thread of its own; returns when it is ready (one worker).

        Raises:
            BackendError, ValueError: one sentence with the root cause; nothing is left running.
        """
        started = self._begin_load()
        with self._readable_errors():
            self._check_vllm()
            if not self._runs_engine():
                super().load()
                return
            generations.install_in_model_process()
            launch_arguments.check_model_directory(Path(self.model_path), self.model_spec.model_format, self._given)
            if self._ranks_elsewhere():
                self._load_across()
            else:
                self._load_here(started)

    def _load_across(self) -> None:
        """Begin the load, which goes on when the other workers have told where their ranks are."""
        with launch_arguments.environment_kept(), start.engine_made_by(self._started_now):
            super().load()
        if self._link is not None:
            asyncio.run_coroutine_threadsafe(self._link.show_place(), self._loop)

    def _started_now(self, engine_args: Any) -> EngineSupervisor:
        return self._started(time.monotonic(), engine_args)

    def _load_here(self, started: float) -> None:
        with launch_arguments.environment_kept():
            seam = start.ENGINE_CLASS
            if self._xavier_config is not None:
                xavier.provide_streams()
                seam = xavier.ENGINE
            with start.engine_made_by(self._make_supervisor, seam):
                super().load()
                if self._loading_thread is not None:  # with a Xavier cache there is none
                    self._loading_thread.join(self._settings.load_timeout)
            if self._stop_requested:
                raise EngineStoppedError(f"The model {self.model_uid} was stopped while it was loading.")
            if self._loading_error is not None:
                raise self._loading_error[1]
        engine_log.include_vllm_logger()
        self._engine.start(started)

    def wait_for_load(self) -> None:
        """Finish the load, and start the health task on the event loop."""
        with self._readable_errors(), self._failure_shown():
            if self._ranks_elsewhere():
                self._await_load()
            super().wait_for_load()
            if not self._runs_engine():
                self._loop.call_soon_threadsafe(self._begin_watch)
        if self._runs_engine():
            self._greet()

    @contextlib.contextmanager
    def _failure_shown(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._ranks_elsewhere() and self._link is not None:
                showing = self._link.show_failure(diagnosis.describe(error))
                concurrent.futures.wait([asyncio.run_coroutine_threadsafe(showing, self._loop)], 2 * TELL_TIMEOUT)
            raise

    def _await_load(self) -> None:
        """Wait for the thread of a load across workers, which Xinference does not bound.

        Raises:
            EngineStartTimeoutError: it was not ready in time.
        """
        thread, limit = self._loading_thread, self._settings.load_timeout
        if thread is None:
            return
        thread.join(limit)  # from here: before, another worker may have downloaded the model
        if thread.is_alive() and self._engine is not None:  # ours, which ends its start by itself
            thread.join(END_MARGIN)
        if thread.is_alive():
            raise EngineStartTimeoutError(
                f"The model {self.raw_model_uid}, on several workers, was not ready after {limit:g} s; "
                "raise load_timeout if it needs longer."
            )

    def _moved(self, move: Move) -> None:
        super()._moved(move)
        if move.state is State.RESTARTING and self._xavier_config is not None and self._link is not None:
            asyncio.run_coroutine_threadsafe(xavier.release(self._link, self.raw_model_uid), self._loop)

    def _begin_watch(self) -> None:
        if not self._stop_requested:
            watch = across.until_gone(self._driver_info["address"], self.raw_model_uid, self._settings)
            self._check_health_task = self._loop.create_task(self._follow(watch))

    async def lost_rank(self, reason: str) -> None:
        """End the engine, of which a rank is gone; called by the worker that had it."""
        if self._engine is not None:
            self._engine.end_engine(reason)

    async def _follow(self, driver_gone: Awaitable[None]) -> None:
        """End this process, and with it the ranks of its worker, when the first part of the model is gone."""
        await driver_gone
        logger.error("The part %d of %s ends: its first part is gone", self._shard, self.raw_model_uid)
        os._exit(EXIT_STATUS)

    def _sanitize_model_config(self, model_config: Any) -> Any:
        config = super()._sanitize_model_config(model_config)
        if platform.is_cpu_build():
            cpu.fill_in(config, self._given, self._settings, self._n_worker)
            if self._runs_engine() and not self._ranks_elsewhere():
                self._environment = cpu.share_cores(config)
        elif self._runs_engine():
            launch_arguments.share_devices(config, self._given, max(1, self._device_count or 0) * self._n_worker)
        return config

    @staticmethod
    def _sanitize_generate_config(generate_config: Any = None) -> Any:
        config = VLLMModel._sanitize_generate_config(generate_config)
        request_arguments.check_guided_json(config["guided_json"])
        return config

    async def heartbeat(self) -> dict[str, Any]:
        told = await super().heartbeat()
        if self._xavier_config is not None:
            told["settings"]["hang_timeout"] = max(told["settings"]["hang_timeout"], xavier.PATIENCE)
        return told

    async def engine_status(self) -> dict[str, Any]:
        return {**await super().engine_status(), "weight_cache": self.weight_cache_status()}

    # -- requests that go on

    def _why_not_again(self) -> str:
        return self.why_cache_is_gone()

    def _failover(self) -> dict[str, Any] | None:
        if self._ranks_elsewhere() or (self._xavier_config is not None and xavier.has_role(self._xavier_config)):
            return None
        return super()._failover()

    def _asked(self) -> tuple[Any, ...]:
        spec = self.model_spec
        of_weights = (
            self.model_family.model_name,
            spec.model_format,
            str(spec.model_size_in_billions),
            self.quantization,
        )
        return of_weights, *self.checkpoint_and_rest(self._given_of(self._model_config))

    # -- stop

    def stop(self) -> None:
        """Stop the engine, or this part of it, in any state; idempotent and bounded. Blocks."""
        if self._runs_engine():
            super().stop()
        else:  # what is remembered of the replica is its first part's
            self._end()

    def _end(self) -> None:
        VLLMModel.stop(self)

    def _stop_engine(self) -> None:
        if self._runs_engine():
            super()._stop_engine()
            self._wait_no_more()
        else:
            self._stop_requested = True
            VLLMModel._stop_engine(self)

    def _wait_no_more(self) -> None:
        """End a load that waits for the other workers."""
        all_ready = getattr(self, "_all_worker_ready", None)
        if all_ready is not None:
            all_ready.set()
