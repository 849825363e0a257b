"""What differs on a host whose vLLM is the CPU build."""

from __future__ import annotations

import os
import re
from collections.abc import Set
from typing import Any

import psutil

from ..settings import Settings

GIB = 1 << 30
KV_CACHE_SHARE = 0.1  # of the memory that is free at launch: leaves room for the weights and for a second model
KV_CACHE_LEAST = 256 << 20  # bytes
KV_CACHE_MOST = 16 * GIB
_VLLM_REQUIREMENT = re.compile(r"^\s*(?:#vllm_dependencies#|vllm(?![\w.-]))", re.IGNORECASE)


def fill_in(arguments: dict[str, Any], given: Set[str], settings: Settings) -> None:
    """Replace Xinference's sizes, which are for GPUs, by ones that work on a CPU host, unless the user gave them.

    The KV cache is given in bytes: vLLM takes ``gpu_memory_utilization`` as the share of all memory that must be free,
    which fails for a second model.

    Args:
        arguments: the engine's arguments, with Xinference's defaults; changed in place.
        given: the names of those that the user gave.
        settings: the options of the model.
    """
    if "block_size" not in given:
        arguments.pop("block_size", None)  # vLLM's own for CPU
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or not given.isdisjoint(
        ("kv_cache_memory_bytes", "gpu_memory_utilization")
    ):
        return
    free = psutil.virtual_memory().available
    chosen = min(max(free * KV_CACHE_SHARE, KV_CACHE_LEAST), KV_CACHE_MOST)
    arguments["kv_cache_memory_bytes"] = int(settings.cpu_kv_cache_gib * GIB or chosen)


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
