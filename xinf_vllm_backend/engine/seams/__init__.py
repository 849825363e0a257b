"""Every name of vLLM, and the private ones of torch, that this package uses; no other module of it does.

The private ones are :class:`Seam` objects. Where one is gone, what it gave is gone with it and the rest works, unless
it is vital. ``SEAMS`` lists them with what is lost; ``xinf-vllm doctor`` prints them and a test looks them up in the
installed vLLM.
"""

from __future__ import annotations

from . import child, core_client, parsers, platform, pooling, rendering, replaying, resuming, start
from .seam import Seam

__all__ = ["SEAMS", "Seam"]

SEAMS = tuple(
    named
    for module in (start, platform, child, core_client, resuming, replaying, pooling, rendering, parsers)
    for named in vars(module).values()
    if isinstance(named, Seam)
)
