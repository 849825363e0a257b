"""What a host zygote imported, and whether a process that starts now would have imported the same."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import environment
from .client import at_start


@dataclass(frozen=True)
class Preloaded:
    """The modules of this process, and what they were made from.

    Attributes:
        environment: the variables with which they were imported.
        read: names of those that were read meanwhile.
        changes: variables that were set, or with None removed, meanwhile.
        files: of each module's file when it was imported: time of its last change, size and inode.
        loggers: level, propagation and handlers of each logger that was configured meanwhile.
    """

    environment: Mapping[str, str]
    read: frozenset[str]
    changes: Mapping[str, str | None]
    files: Mapping[str, tuple[int, int, int] | None]
    loggers: Mapping[str, tuple[int, bool, Sequence[logging.Handler]]]

    @classmethod
    def by(cls, preload: Callable[[], None], own: Mapping[str, str | None]) -> Preloaded:
        """Call ``preload`` and note what it does.

        Args:
            preload: imports modules.
            own: variables that only this process has, each with the value that others have or None.
        """
        before = dict(os.environ)
        with environment.noted() as read:
            preload()
        after = dict(os.environ)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        return cls(
            _with(before, own),
            frozenset(read),
            {name: after.get(name) for name in changed},
            {path: _stamp(path) for path in _files()},
            dict(_configured_loggers()),
        )

    def why_not(self, wanted: Mapping[str, str]) -> str | None:
        """Why a process with the environment ``wanted`` would not be as these modules are; None if it would."""
        relevant = {name for name in wanted.keys() | self.environment.keys() if name in self.read or at_start(name)}
        differing = sorted(name for name in relevant if wanted.get(name) != self.environment.get(name))
        if differing:
            return f"its modules were imported with other values of {', '.join(differing)}"
        return None

    def outdated(self) -> str | None:
        """The file of a module that has changed since it was imported; None if there is none."""
        return next((path for path, stamp in self.files.items() if _stamp(path) != stamp), None)

    def configure_loggers(self) -> None:
        """Configure the loggers as importing the modules now would: on top of what was configured since."""
        for name, (level, propagate, handlers) in self.loggers.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.addHandler(handler)  # a no-op for one that is there

    def applied_to(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """``wanted`` as importing the modules would have changed it."""
        return _with(wanted, self.changes)

    def undone_in(self, variables: Mapping[str, str]) -> dict[str, str]:
        """``variables`` of a process with these modules, as they were before importing the modules changed them."""
        changed = {name for name, value in variables.items() if name in self.changes and value == self.changes[name]}
        return _with(variables, {name: self.environment.get(name) for name in changed})


def _with(variables: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**variables, **changes}.items() if value is not None}


def _files() -> Iterator[str]:
    for module in list(sys.modules.values()):
        path: Any = getattr(module, "__file__", None)
        if isinstance(path, str) and os.path.isabs(path):
            yield path


def _configured_loggers() -> Iterator[tuple[str, tuple[int, bool, Sequence[logging.Handler]]]]:
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and (logger.level or logger.handlers or not logger.propagate):
            yield name, (logger.level, logger.propagate, tuple(logger.handlers))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


of_this_process: Preloaded | None = None  # where a host zygote forked it
