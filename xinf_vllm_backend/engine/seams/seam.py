"""One private name of vLLM or torch, and how it is wrapped."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """One private name of vLLM.

    Attributes:
        module: where the name is.
        attribute: the name inside the module, with dots; the last part may be an attribute that instances alone have.
        used_for: what the name gives.
        without: what is lost where it is gone.
        members: attributes that the named object has to have, too.
        vital: whether nothing can be served without it; the loss of any other only degrades.
        moved: where other versions of vLLM have it: pairs of module and attribute.
    """

    module: str
    attribute: str
    used_for: str
    without: str
    members: tuple[str, ...] = ()
    vital: bool = False
    moved: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name in the installed vLLM; where it is gone, the first place it is looked for."""
        module, attribute, _ = self._found() or (self.module, self.attribute, None)
        return f"{module}.{attribute}" + (f" ({', '.join(self.members)})" if self.members else "")

    def owner(self) -> Any:
        """The object that holds the name, or None where it is gone."""
        found = self._found()
        return None if found is None else found[2]

    def present(self) -> bool:
        return self._found() is not None

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Put ``wrapper(original)`` in the place of the name, once; False where the name is gone."""
        found = self._found()
        if found is None:
            return False
        _, attribute, owner = found
        last = attribute.rpartition(".")[2]
        original = getattr(owner, last)
        if not hasattr(original, "_xinf_vllm_original"):
            replacement = wrapper(original)
            replacement._xinf_vllm_original = original  # type: ignore[attr-defined]
            is_bound = isinstance(inspect.getattr_static(owner, last), (staticmethod, classmethod))  # ``original`` is
            setattr(owner, last, staticmethod(replacement) if is_bound else replacement)
        return True

    def _found(self) -> tuple[str, str, Any] | None:
        """Module, attribute and owner of the first place where the name is."""
        for module, attribute in ((self.module, self.attribute), *self.moved):
            *path, last = attribute.split(".")
            try:
                owner = functools.reduce(getattr, path, importlib.import_module(module))
            except (ImportError, AttributeError):
                continue
            if _has(owner, last) and all(_has(_original(owner, last), member) for member in self.members):
                return module, attribute, owner
        return None


def _original(owner: Any, name: str) -> Any:
    """What vLLM has under the name, wrapped or not."""
    named = getattr(owner, name)
    return getattr(named, "_xinf_vllm_original", named)


def _has(owner: Any, name: str) -> bool:
    """Whether ``owner`` has the attribute ``name``, or gives it to each of its instances."""
    if hasattr(owner, name):
        return True
    inits = (vars(cls).get("__init__") for cls in (owner.__mro__ if isinstance(owner, type) else ()))
    codes = (getattr(inspect.unwrap(init), "__code__", None) for init in inits if init is not None)
    return any(name in code.co_names for code in codes if code is not None)
