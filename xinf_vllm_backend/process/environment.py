"""Changes to ``os.environ`` that only the thread that makes them sees."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

_changes: ContextVar[dict[str, str | None] | None] = ContextVar("changes to the environment", default=None)


@contextlib.contextmanager
def private(**variables: str) -> Iterator[None]:
    """Set ``variables`` and keep all changes of ``os.environ`` to this thread, until the end of the block.

    Libraries that configure themselves and their children by ``os.environ`` work, on any number of threads at once. The
    environment in C is not changed.
    """
    _enter()
    token = _changes.set({**(_changes.get() or {}), **variables})
    try:
        yield
    finally:
        _changes.reset(token)
        _leave()


_lock = threading.Lock()
_inside = 0  # blocks that are open, on all threads


def _enter() -> None:
    global _inside
    with _lock:
        _inside += 1
        if not isinstance(os.environ, _Environment):
            os.environ.__class__ = _Environment  # in place: other modules hold the object


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside and type(os.environ) is _Environment:
            os.environ.__class__ = _PLAIN  # type: ignore[assignment] # libraries may read a variable for each token


@contextlib.contextmanager
def public(**variables: str) -> Iterator[None]:
    """Set ``variables`` in the environment of the whole process, until the end of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def noted() -> Iterator[set[str]]:
    """Note the names of the variables that are read from ``os.environ``, on any thread, until the end of the block.

    To copy the whole environment is not to read a variable. What C code reads is not seen.
    """
    before = os.environ.__class__
    _Noting.names = set()
    os.environ.__class__ = _Noting
    try:
        yield _Noting.names
    finally:
        os.environ.__class__ = before


_PLAIN = type(os.environ)


class _Noting(type(os.environ)):  # type: ignore[misc]
    names: set[str]
    copied: ClassVar[deque[str]] = deque()  # those whose values the one who iterates asks for next

    def __getitem__(self, name: str) -> Any:
        if self.copied and self.copied[0] == name:
            self.copied.popleft()
        else:
            self.copied.clear()
            self.names.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.copied.clear()
        for name in super().__iter__():
            self.copied.append(name)
            yield name


class _Environment(type(os.environ)):  # type: ignore[misc]
    def __getitem__(self, name: str) -> Any:
        changes = _changes.get()
        if changes is None or name not in changes:
            return super().__getitem__(name)
        value = changes[name]
        if value is None:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: str) -> None:
        changes = _changes.get()
        if changes is None:
            super().__setitem__(name, value)
        else:
            changes[self.decodekey(self.encodekey(name))] = self.decodevalue(self.encodevalue(value))

    def __delitem__(self, name: str) -> None:
        changes = _changes.get()
        if changes is None:
            super().__delitem__(name)
            return
        if name not in self:
            raise KeyError(name)
        changes[name] = None

    def __iter__(self) -> Iterator[str]:
        changes = _changes.get()
        if changes is None:
            yield from super().__iter__()
            return
        yield from (name for name in super().__iter__() if name not in changes)
        yield from [name for name, value in changes.items() if value is not None]

    def __len__(self) -> int:
        return super().__len__() if _changes.get() is None else sum(1 for _ in self)
