"""Model processes out of a host zygote: this runs in the host zygote, and in the model process that it forks."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from ..engine import preload as engine
from ..engine.seams import start
from ..process import stacks
from ..process.zygote import preloaded

SPAWNED_BECAUSE = "XINF_VLLM_SPAWNED_BECAUSE"  # tells a model process why it was not forked

# The functions that a host zygote is given: what imports, and what says why a fork would not be clean.
ENTRY_POINTS = (f"{__name__}:preload", f"{engine.__name__}:hazard")

# What a model process imports until its engine starts.
_MODULES = (
    "xoscar.backends.indigen.pool",
    "uvloop",
    "xinference.deploy.utils",
    "xinference.core.model",
    "xinference.core.worker",
    "xinference.core.progress_tracker",
    "xinference.core.status_guard",
    "xinference.core.event",
    "xinference.model.llm.vllm.reasoning",
    "xinf_vllm_backend.plugin.vllm.models",
    "xinf_vllm_backend.plugin.vllm.pooling_models",
)


def preload() -> None:
    """Run in the host zygote: import what a model process and its engines import."""
    engine.import_all(_MODULES)
    engine.preload("")


def configure_loggers() -> None:
    """Configure the loggers of libraries as importing them does, after Xinference configured its own; idempotent."""
    if preloaded.of_this_process is not None:
        preloaded.of_this_process.configure_loggers()
        start.configure_logging()


def as_given(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables`` of this process, as they were before it imported anything, as far as that is known."""
    known = preloaded.of_this_process
    return dict(variables) if known is None else known.undone_in(variables)


def how_started() -> str:
    """How this model process was started, and if it was spawned why."""
    if preloaded.of_this_process is not None:
        return "forked from the host zygote"
    return f"spawned: {os.environ.get(SPAWNED_BECAUSE, 'there is no host zygote')}"


@functools.cache
def stacks_file() -> int | None:
    """The file descriptor by which this model process shows its stacks; see :func:`.stacks.register`."""
    return stacks.register()
