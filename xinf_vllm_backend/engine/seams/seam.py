"""One private name of vLLM, and how it is wrapped."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """One private name: where it is, what it is used for, and what is lost without it."""

    module: str
    attribute: str
    used_for: str
    without: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def owner(self) -> Any:
        """The object that holds the name, or None where it is gone."""
        *path, last = self.attribute.split(".")
        try:
            owner = functools.reduce(getattr, path, importlib.import_module(self.module))
        except (ImportError, AttributeError):
            return None
        return owner if hasattr(owner, last) else None

    def present(self) -> bool:
        return self.owner() is not None

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Put ``wrapper(original)`` in the place of the name, once; False where the name is gone."""
        owner = self.owner()
        if owner is None:
            return False
        last = self.attribute.rpartition(".")[2]
        original = getattr(owner, last)
        if not hasattr(original, "_xinf_vllm_original"):
            replacement = wrapper(original)
            replacement._xinf_vllm_original = original  # type: ignore[attr-defined]
            is_static = isinstance(inspect.getattr_static(owner, last), staticmethod)
            setattr(owner, last, staticmethod(replacement) if is_static else replacement)
        return True
