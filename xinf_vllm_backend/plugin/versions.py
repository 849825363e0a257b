"""The versions of what a model process runs on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from urllib.parse import quote

from ..__version__ import __version__
from ..engine.seams import platform as build
from ..engine.seams import version
from ..errors import UnsupportedVersionError


@functools.cache
def versions() -> dict[str, str | None]:
    """By name; None for what is not installed. Reads the disk once."""
    return {
        "xinf_vllm_backend": __version__,
        "vllm": version.version(),
        "xinference": _installed("xinference"),
        "torch": _installed("torch"),
        "python": platform.python_version(),
    }


def check_vllm(worker_prefix: str, cpu_host: bool, model_name: str) -> None:
    """Refuse the vLLM of this model process where it cannot serve; a model's virtual environment may have its own.

    Args:
        worker_prefix: ``sys.prefix`` of the worker.
        cpu_host: whether the worker has the CPU build.
        model_name: by which Xinference knows the environment.

    Raises:
        UnsupportedVersionError: none is installed, its version is out of range, or it is built for GPUs on a CPU host.
    """
    if sys.prefix == worker_prefix or not version.is_below(sys.prefix):
        version.check_version()
        return
    remedy = (
        f"it is in the model's virtual environment {sys.prefix}, so launch with --disable-virtual-env, or remove that "
        f"environment by DELETE /v1/virtualenvs?model_name={quote(model_name)} and "
    )
    if cpu_host and not build.is_cpu_build():
        raise UnsupportedVersionError(
            f"vLLM {_installed('vllm')} is a build for GPUs, and the worker has the CPU build; {remedy}do not ask for "
            "vLLM with --virtual-env-package."
        )
    version.check_version(f"{remedy}ask for one in the range, as in --virtual-env-package 'vllm{version.SUPPORTED}'")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
