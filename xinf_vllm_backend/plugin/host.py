"""Chat models: the classes of Xinference that generate text, hosted."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from xinference.model.llm.vllm.core import VLLMModel

from ..engine.seams import platform, start
from ..errors import EngineStartTimeoutError, EngineStoppedError
from . import cpu, engine_log, generations, launch_arguments, request_arguments, weight_cache
from .hosted import Hosted

logger = logging.getLogger("xinference.vllm_backend")


class HostedModel(Hosted, weight_cache.Cached, VLLMModel):
    """A mixin for Xinference's vLLM classes of chat models.

    Models across several workers and with a Xavier cache run Xinference's own engine, with our errors, health task and
    stop.
    """

    def __init__(
        self, model_uid: str, model_family: Any, model_path: str, model_config: Any, peft_model: Any = None
    ) -> None:  # Xinference hands LoRA modules only to a class with a parameter of this very name
        arguments = {} if model_config is None else model_config
        options = self._options_in(arguments)
        given = frozenset(arguments)
        super().__init__(model_uid, model_family, model_path, arguments, peft_model)
        self._host(options, given)
        launch_arguments.refuse_unsupported(self._n_worker, self._get_xinference_executor_backend(), self._cpu_host)
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
        if not self._is_ours():
            upstreams: tuple[bool, str] = super()._native_mp_route()
            return upstreams
        several = self._get_allocated_device_count() > 1
        return several, "several devices of one worker" if several else "one device"

    def _get_native_mp_parallelism(self) -> tuple[int, int]:
        return self._model_config["tensor_parallel_size"], self._model_config["pipeline_parallel_size"]

    def _is_ours(self) -> bool:
        return self._n_worker == 1 and self._xavier_config is None

    # -- load

    def load(self) -> None:
        """Load the engine on a thread of its own; returns when it is ready (one worker).

        Raises:
            BackendError, ValueError: one sentence with the root cause; nothing is left running.
        """
        started = self._load_started = self._begin_load()
        with self._readable_errors():
            self._check_vllm()
            if not self._is_ours():
                super().load()
                return
            generations.install_in_model_process()
            launch_arguments.check_model_directory(Path(self.model_path), self.model_spec.model_format, self._given)
            self._load_here(started)

    def _load_here(self, started: float) -> None:
        with launch_arguments.environment_kept():
            with start.engine_made_by(self._make_supervisor):
                super().load()
                self._loading_thread.join(self._settings.load_timeout)
            if self._stop_requested:
                raise EngineStoppedError(f"The model {self.model_uid} was stopped while it was loading.")
            if self._loading_error is not None:
                raise self._loading_error[1]
        engine_log.include_vllm_logger()
        self._engine.start(started)

    def wait_for_load(self) -> None:
        """Finish the load, and start the health task on the event loop."""
        with self._readable_errors():
            if not self._is_ours():
                self._await_upstreams()
            super().wait_for_load()
        self._greet()

    def _await_upstreams(self) -> None:
        """Wait for Xinference's own engine, whose load has no bound.

        Raises:
            EngineStartTimeoutError: it was not ready in time.
        """
        thread, limit = self._loading_thread, self._settings.load_timeout
        if thread is None:
            return
        thread.join(max(0.0, self._load_started + limit - time.monotonic()))
        if thread.is_alive():
            raise EngineStartTimeoutError(
                f"The model {self.raw_model_uid}, on several workers or with a Xavier cache, was not ready after "
                f"{limit:g} s; raise load_timeout if it needs longer."
            )

    def _sanitize_model_config(self, model_config: Any) -> Any:
        config = super()._sanitize_model_config(model_config)
        if platform.is_cpu_build():
            cpu.fill_in(config, self._given, self._settings, self._n_worker)
            if self._is_ours():
                self._environment = cpu.share_cores(config)
        elif self._is_ours():
            launch_arguments.share_devices(config, self._given, max(1, self._device_count or 0))
        return config

    @staticmethod
    def _sanitize_generate_config(generate_config: Any = None) -> Any:
        config = VLLMModel._sanitize_generate_config(generate_config)
        request_arguments.check_guided_json(config["guided_json"])
        return config

    async def engine_status(self) -> dict[str, Any]:
        return {**await super().engine_status(), "weight_cache": self.weight_cache_status()}

    # -- requests that go on

    def _why_not_again(self) -> str:
        return self.why_cache_is_gone()

    def _failover(self) -> dict[str, Any] | None:
        return super()._failover() if self._is_ours() else None

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

    def _end(self) -> None:
        VLLMModel.stop(self)

    def _stop_engine(self) -> None:
        if self._is_ours():
            super()._stop_engine()
        else:
            self._stop_requested = True
            VLLMModel._stop_engine(self)
