"""Which Xinference is installed, and which ones this package supports."""

from __future__ import annotations

import importlib.metadata
import logging

from packaging.specifiers import SpecifierSet

from ..engine.seams.version import is_supported

logger = logging.getLogger("xinference.vllm_backend")

SUPPORTED = SpecifierSet(">=4.1,<4.2")


def warn_if_unsupported() -> None:
    """Log a warning if the Xinference that loads the extension is outside the supported range.

    It is not refused: what the extension relies on may well be there, and what is missing is reported where it is used.
    """
    try:
        found = importlib.metadata.version("xinference")
    except importlib.metadata.PackageNotFoundError:
        return  # a source tree on the path
    if not is_supported(found, SUPPORTED):
        logger.warning(
            "xinf_vllm_backend was made for Xinference %s and is loaded into %s; run xinf-vllm doctor to see what it "
            "lacks, or install a supported version.",
            SUPPORTED,
            found,
        )
