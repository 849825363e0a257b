"""The versions of what a model process runs on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

from ..__version__ import __version__
from ..engine.seams import version


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


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
