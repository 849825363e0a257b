"""The zygote of a model process: when one is used, and what it imports for the engine processes that it forks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..process.zygote.client import ZygoteClient
from ..process.zygote.manager import Zygote
from .seams import platform, start

logger = logging.getLogger(__name__)

_zygote: Zygote | None = None
_given_up = False  # there will be no other
_lock = threading.Lock()


def start_zygote(method: str, model: str) -> None:
    """Start this process's zygote, once, unless ``method`` means to spawn here.

    Call it early: the zygote imports while this process does.

    Args:
        method: the setting ``engine_start_method``.
        model: the model's directory; its architecture is not preloaded for a mere name.
    """
    global _zygote
    with _lock:
        if _zygote is not None or _given_up or resolve(method) != "zygote":
            return
        environment = {**os.environ, **start.SPAWN, **platform.ld_preload()}
        zygote = Zygote(environment, functools.partial(preload, model), hazard)
        try:
            zygote.start()
        except OSError as error:
            logger.warning("Engine processes are spawned: there can be no zygote: %s", error)
            return
        _zygote = zygote


def resolve(method: str) -> str:
    """The method that ``method`` means here."""
    return "zygote" if method == "auto" else method


def zygote_client(method: str) -> ZygoteClient | None:
    """The client that has engine processes forked; None where they are to be spawned.

    Raises:
        ZygoteUnavailableError: the zygote is gone.
    """
    with _lock:
        zygote = _zygote
    return None if zygote is None or resolve(method) != "zygote" else zygote.client()


def zygote_pid() -> int | None:
    """The pid of this process's zygote; None if it has none."""
    with _lock:
        return None if _zygote is None else _zygote.pid


def stop_zygote() -> None:
    """End this process's zygote; its children live on."""
    global _zygote
    with _lock:
        zygote, _zygote = _zygote, None
    if zygote is not None:
        zygote.stop()


def give_up_zygote(why: str) -> None:
    """Have all further engine processes of this process spawned: end its zygote and start no other."""
    global _zygote, _given_up
    with _lock:
        if _given_up:
            return
        _given_up = True
        zygote, _zygote = _zygote, None
    logger.warning("The zygote is given up, and engine processes are spawned from now on: %s", why)
    if zygote is not None:
        zygote.stop()


def preload(model: str) -> None:
    """Run in the zygote: import what EngineCore and its Workers need for this platform and architecture."""
    import_all(_modules(model))


def import_all(modules: Iterable[str]) -> None:
    """Import ``modules``, as far as they can be."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever it is, the process that needs it meets it, too
            logger.warning("The zygote goes without %s: %r", module, error)


def hazard() -> str | None:
    """Run in the zygote before each fork, and in each child after it: why that is not clean; None if it is."""
    if os.environ.get(platform.CUDA_COMPATIBILITY, "0") not in ("", "0"):
        return "the linker finds CUDA's compatibility libraries only in a fresh process"
    return platform.initialised_accelerator()


def _modules(model: str) -> Iterator[str]:
    yield from platform.ENGINE_MODULES
    with contextlib.suppress(ImportError, AttributeError):
        yield from platform.worker_modules()
    for architecture in _architectures(Path(model)):
        module = platform.module_of(architecture)
        if module is not None:
            yield module


def _architectures(model: Path) -> list[str]:
    try:
        found = json.loads((model / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):  # no configuration, or not one of Transformers
        return []
    return found if isinstance(found, list) else []
