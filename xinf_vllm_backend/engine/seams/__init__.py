"""Every private name of vLLM that this package imports, wraps or reads, and no other module of it does.

Each is guarded: where a name is gone, what it gave is gone with it and the rest works. ``SEAMS`` lists them with what
is lost; ``xinf-vllm doctor`` prints it and a test runs it against the installed vLLM.
"""

from __future__ import annotations

from . import child, core_client, platform, resuming, start
from .seam import Seam

__all__ = ["SEAMS", "Seam"]

SEAMS = (
    start.CONTEXT,
    start.HANDSHAKE,
    start.INSPECTION,
    platform.REGISTRY,
    child.SHARED_MEMORY,
    child.WEIGHTS,
    child.PROFILING,
    child.WARM_UP,
    core_client.CLIENT,
    core_client.RESOURCES,
    core_client.OUTPUT_QUEUE,
    resuming.GRAMMAR,
    resuming.INPUTS,
)
