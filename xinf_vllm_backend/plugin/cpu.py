"""What differs on a host whose vLLM is the CPU build."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import psutil

from ..errors import BadLaunchArgumentError
from ..settings import Settings
from .launch_arguments import take_sizes

GIB = 1 << 30
BINDING = "VLLM_CPU_OMP_THREADS_BIND"  # by which vLLM binds the threads of each rank to cores
IN_ENGINE = ("tensor_parallel_size", "pipeline_parallel_size")  # kinds of parallelism inside a data-parallel rank
BESIDE = "data_parallel_size"
KV_CACHE_SHARE = 0.1  # of the memory that is free at launch: leaves room for the weights and for a second model
KV_CACHE_LEAST = 256 << 20  # bytes
KV_CACHE_MOST = 16 * GIB
_VLLM_REQUIREMENT = re.compile(r"^\s*(?:#vllm_dependencies#|vllm(?![\w.-]))", re.IGNORECASE)


def fill_in(arguments: dict[str, Any], given: Set[str], settings: Settings, workers: int = 1) -> None:
    """Replace Xinference's sizes, which are for GPUs, by ones that work on a CPU host, unless the user gave them.

    The KV cache is given in bytes, for each rank: vLLM takes ``gpu_memory_utilization`` as the share of all memory that
    must be free, which fails for a second model or rank.

    Args:
        arguments: the engine's arguments, with Xinference's defaults; changed in place.
        given: the names of those that the user gave.
        settings: the options of the model.
        workers: hosts that share the ranks.

    Raises:
        BadLaunchArgumentError: the size of a kind of parallelism is no whole number of 1 or more.
    """
    ranks = max(1, take_sizes(arguments, *IN_ENGINE, BESIDE) // workers)
    if "block_size" not in given:
        arguments.pop("block_size", None)  # vLLM's own for CPU
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or not given.isdisjoint(
        ("kv_cache_memory_bytes", "gpu_memory_utilization")
    ):
        return
    free = psutil.virtual_memory().available
    chosen = min(max(free * KV_CACHE_SHARE / ranks, KV_CACHE_LEAST), KV_CACHE_MOST)
    arguments["kv_cache_memory_bytes"] = int(settings.cpu_kv_cache_gib * GIB or chosen)


def share_cores(arguments: dict[str, Any], cores: Sequence[int] | None = None, nodes: int = 0) -> dict[str, str]:
    """Give each rank as many cores as any other, where vLLM would give several the same ones, or none.

    vLLM itself binds each to the cores of a NUMA node, and data-parallel ranks to those of the first.

    Args:
        arguments: the engine's arguments.
        cores: that this process may use; by default those the system says.
        nodes: NUMA nodes with cores; by default those of the host.

    Returns:
        Variables for the engine's processes.

    Raises:
        BadLaunchArgumentError: more ranks than cores, or than ``VLLM_CPU_OMP_THREADS_BIND`` has parts.
    """
    cores = sorted(os.sched_getaffinity(0)) if cores is None else cores
    size = take_sizes(arguments, *IN_ENGINE)
    ranks = size * take_sizes(arguments, BESIDE)
    bound = os.environ.get(BINDING, "")
    if ranks == 1 or bound == "nobind":
        return {}
    if bound not in ("", "auto"):
        _check_parts(bound.count("|") + 1, ranks, size)
        return {}
    if ranks > len(cores):
        raise BadLaunchArgumentError(
            f"{ranks} tensor, pipeline and data parallel ranks need {ranks} cores, but this process may use "
            f"{len(cores)}; ask for fewer ranks, or set {BINDING}=nobind to let them share cores."
        )
    if bound == "auto" or (size == ranks and (nodes or _nodes()) >= ranks):
        return {}
    share = len(cores) // ranks
    parts = [cores[share * rank : share * (rank + 1)] for rank in range(ranks)]
    return {BINDING: "|".join(",".join(map(str, part)) for part in parts)}


def _check_parts(parts: int, ranks: int, size: int) -> None:
    # Of tensor and pipeline parallelism alone vLLM wants exactly one for each rank.
    if parts < ranks or (size == ranks and parts > ranks):
        raise BadLaunchArgumentError(
            f"{BINDING} binds {parts} ranks, but there are {ranks}; give it {ranks} parts, separated by '|'."
        )


def _nodes() -> int:
    """Number of NUMA nodes with cores."""
    lists = Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")
    return sum(1 for path in lists if path.read_text().strip())


def without_vllm(model_family: Any) -> Any:
    """Return a copy of ``model_family`` whose virtualenv installs no vLLM, which would be the CUDA build.

    The family itself is shared by all launches and is not changed.
    """
    virtualenv = getattr(model_family, "virtualenv", None)
    if virtualenv is None or not any(map(_VLLM_REQUIREMENT.match, virtualenv.packages)):
        return model_family
    packages = [package for package in virtualenv.packages if not _VLLM_REQUIREMENT.match(package)]
    family = model_family.copy()
    family.virtualenv = virtualenv.copy(update={"packages": packages})
    return family
