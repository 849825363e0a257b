"""How a model arrives in its own process: the zygote is started before anything heavy is imported.

Xinference pickles the model in the worker. Its class, and the plain data it holds, come with all of Xinference's and
vLLM's modules: several seconds in which a zygote, started first, imports its own beside them.
"""

from __future__ import annotations

import gc
import importlib
import pickle
import sys
from typing import Any

from ..engine import preload
from . import engine_log

# What xoscar runs in the process of a model.
SUB_POOL = "start_sub_pool"


def reduce_model(model: Any, method: str, path: str) -> tuple[Any, ...]:
    """What ``__reduce__`` of ``model`` is to return.

    Args:
        model: holds plain data only.
        method: the setting ``engine_start_method``; "spawn" starts no zygote.
        path: directory of the model.
    """
    cls = type(model)
    # Nested, so that nothing of it is unpickled, and imported, before the zygote is started.
    return _rebuild_model, (method, path, cls.__module__, cls.__qualname__, pickle.dumps(vars(model)))


def _rebuild_model(method: str, path: str, module: str, name: str, state: bytes) -> Any:
    in_model_process = SUB_POOL in sys.argv
    if in_model_process:
        engine_log.include_our_loggers()
        preload.start_zygote(method, path)
    collects = gc.isenabled()
    gc.disable()  # a fourth of the time of the imports, and nothing found
    try:
        cls = getattr(importlib.import_module(module), name)
        model = cls.__new__(cls)
        vars(model).update(pickle.loads(state))
    finally:
        if collects:
            gc.enable()
    if in_model_process:
        gc.freeze()  # what was imported stays: no collection has to look at it again
    return model
