"""Which Xinference is installed, and which ones this package supports."""

from __future__ import annotations

import importlib.metadata
import logging

from packaging.specifiers import SpecifierSet

from ..engine.seams.version import is_supported
from ..errors import UnsupportedVersionError

logger = logging.getLogger("xinference.vllm_backend")

SUPPORTED = SpecifierSet(">=4.0,<4.2")


def check() -> None:
    """Refuse an unsupported Xinference.

    Raises:
        UnsupportedVersionError: its version is out of range; one without a version, a source tree, is accepted.
    """
    reason = _why_unsupported()
    if reason is not None:
        raise UnsupportedVersionError(reason)


def warn_if_unsupported() -> None:
    """Log a warning if the Xinference that loads the extension is outside the supported range.

    Only launches are refused: Xinference also serves models of other engines.
    """
    reason = _why_unsupported()
    if reason is not None:
        logger.warning("No model with the engine vLLM will be launched here: %s", reason)


def _why_unsupported() -> str | None:
    try:
        found = importlib.metadata.version("xinference")
    except importlib.metadata.PackageNotFoundError:
        return None
    if is_supported(found, SUPPORTED):
        return None
    return (
        f"Xinference {found} is outside the range {SUPPORTED} that xinf_vllm_backend supports; install one that is in "
        "it, or take xinf_vllm_backend out of XINFERENCE_EXTENSIONS."
    )
