"""The extension object that Xinference loads in its API, supervisor and worker processes."""

from __future__ import annotations

import gc
from typing import Any

from ..__version__ import __version__
from . import (
    across,
    generations,
    metrics,
    model_cache,
    model_watch,
    registration,
    relaunch,
    sub_pools,
    xinference_version,
)
from .cluster_link import METRICS


class VLLMBackendExtension:
    """Registers our classes for the engine "vLLM" and adds to the API; resources stay as they are."""

    name = "xinf_vllm_backend"
    api_version = 1

    def __init__(self) -> None:
        install()

    def configure_api(self, context: Any) -> None:
        from . import middleware, rest_errors, routes
        from .push import api_side

        routes.add(context)
        rest_errors.install(context.app)
        middleware.install(context.app)
        api_side.install(context.app.state.api)
        gc.freeze()  # what was imported stays: to look at all of it holds up every stream for most of a second

    def worker_metadata(self) -> dict[str, str]:
        """Called in workers alone, when they register with a supervisor."""
        sub_pools.start_host_zygote()
        return {"version": __version__}

    def filter_worker_resources(self, worker: dict[str, Any], workers: list[dict[str, Any]]) -> list[int]:
        return list(worker["gpu_devices"])


def install() -> None:
    """Make this process, whichever of Xinference's it is, one of ours; idempotent."""
    xinference_version.warn_if_unsupported()  # first: with such a one an import may fail
    _define_metrics()
    sub_pools.install()
    model_watch.install()
    across.install()
    relaunch.install()
    generations.install_in_worker()
    metrics.install_in_worker()
    model_cache.install()
    registration.install()


def _define_metrics() -> None:
    # Xinference finds a metric by its name in that module; the worker's exporter shows it.
    from xinference.core import metrics as xinferences

    for name, what in METRICS.items():
        if not hasattr(xinferences, name):
            setattr(xinferences, name, xinferences.Counter(f"xinference:{name.removeprefix('xinf_')}_total", what))
