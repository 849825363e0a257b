"""Replicas that are launched at the same moment link the files of their model at the same moment.

Each launch has a thread of the worker that looks for Xinference's link to them, and makes it where it is not there. Of
two that do, the second fails, and its launch with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..engine.seams.seam import Seam

LINK = Seam(
    "xinference.model.llm.cache_manager",
    "LLMCacheManager.cache_uri",
    "launching several replicas of a registered model at the same moment, for the first time",
    "the launch of one of them may fail",
)
SEAMS = (LINK,)


def install() -> None:
    """Have the second of two find the link of the first; idempotent."""
    LINK.wrap(_looking_again)


def _looking_again(original: Callable[[Any], str]) -> Callable[[Any], str]:
    @functools.wraps(original)
    def cache_uri(manager: Any) -> str:
        try:
            return original(manager)
        except FileExistsError:  # made since it looked
            return original(manager)

    return cache_uri
