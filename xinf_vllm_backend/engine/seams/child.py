"""What each engine process does before it runs vLLM."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from ...process import bootstrap
from ...process.context import EngineContext
from ..phase import Phase
from . import platform, resuming, start
from .seam import Seam

WEIGHTS = Seam(
    "vllm.v1.worker.worker_base",
    "WorkerWrapperBase.init_worker",
    "the launch phase 'weights'",
    "that phase is not shown",
)
PROFILING = Seam(
    "vllm.v1.executor.abstract",
    "Executor.determine_available_memory",
    "the launch phase 'memory profiling'",
    "that phase is not shown",
)
WARM_UP = Seam(
    "vllm.v1.executor.abstract",
    "Executor.initialize_from_config",
    "the launch phase 'warm-up'",
    "that phase is not shown",
)


SHARED_MEMORY = Seam(
    "vllm.distributed.device_communicators.cpu_communicator",
    "_CPUSHMDistributed.make_group_name",
    "removing the shared memory of killed CPU engines with several ranks",
    "it stays in /dev/shm",
)
WAITING = Seam(
    "vllm.distributed.device_communicators.shm_broadcast",
    "sched_yield",
    "leaving the cores of a CPU host to others while EngineCore and its Workers wait for each other",
    "they spin while they wait, and for a second after the last step",
)
SPINS, NAP = 0.0001, 0.0005  # seconds: a wait spins at first, and looks again this often at least
OVERSHOOT = 0.1  # share of a wait that it may take longer for its naps
SAME_WAIT = 0.0001  # seconds between two looks of one wait, at most


def prepare_child() -> None:
    """Run in each engine process before its target; its own children then come from a context like its own."""
    platform.use_own_ports()  # also for its children, which are told where to look
    start.use_everywhere(EngineContext(start.SPAWN, prepare_child))
    if bootstrap.inherited_handles().mark:
        SHARED_MEMORY.wrap(functools.partial(_marked, bootstrap.inherited_handles().mark))
    if platform.is_cpu_build():
        WAITING.wrap(napping)
    resuming.GRAMMAR.wrap(resuming.advance_grammar)
    resuming.INPUTS.wrap(resuming.cache_in_frontend)
    for seam, phase in ((WEIGHTS, Phase.WEIGHTS), (PROFILING, Phase.PROFILING), (WARM_UP, Phase.WARM_UP)):
        seam.wrap(functools.partial(_reporting, phase))


def napping(original: Callable[[], None]) -> Callable[[], None]:
    """What a process does between two looks whether it has been sent something: it sleeps, the longer it has waited.

    vLLM only yields its core: where as many threads compute as there are cores, that takes from them what they need.
    """
    began = ended = 0.0

    @functools.wraps(original)
    def nap() -> None:
        nonlocal began, ended
        now = time.monotonic()
        if now - ended > SAME_WAIT:
            began = now
        if now - began < SPINS:
            original()
        else:
            time.sleep(min(NAP, OVERSHOOT * (now - began)))
        ended = time.monotonic()

    return nap


def _reporting(phase: Phase, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reported(*args: Any, **kwargs: Any) -> Any:
        bootstrap.report(phase.value)
        return original(*args, **kwargs)

    return reported


def _marked(mark: str, original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> str:
        return f"{mark}-{original(*args, **kwargs)}"

    return marked
