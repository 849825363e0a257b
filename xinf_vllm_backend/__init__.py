"""A vLLM v1 backend for Xinference that says what it does, recovers, and leaves nothing behind.

Importing this package imports neither vLLM, torch nor Xinference: Xinference names it in
``XINFERENCE_EXTENSIONS=xinf_vllm_backend:extension`` and calls :func:`extension` when it starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .__version__ import __version__

if TYPE_CHECKING:
    from .plugin.extension import VLLMBackendExtension

__all__ = ["__version__", "extension"]


def extension() -> VLLMBackendExtension:
    """Make the extension object that Xinference's ``XINFERENCE_EXTENSIONS`` asks for.

    Putting our classes behind the engine name "vLLM" is part of making it.
    """
    from .plugin.extension import VLLMBackendExtension

    return VLLMBackendExtension()
