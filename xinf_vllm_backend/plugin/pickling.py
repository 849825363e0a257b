"""How a model is unpickled in its own process: the zygote is started before anything heavy is imported.

Xinference pickles the model in the worker. Unpickling its class and data imports all of Xinference and vLLM, which
takes several seconds; a zygote that was started first does its own imports at the same time.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import sys
from typing import Any

from ..engine import preload
from . import engine_log, model_process

# What xoscar runs in the process of a model.
SUB_POOL = "start_sub_pool"


def reduce_model(model: Any, method: str | None, variable: str, path: str) -> tuple[Any, ...]:
    """What ``__reduce__`` of ``model`` is to return.

    Args:
        model: holds plain data only.
        method: the setting ``engine_start_method`` if the launch gave it; "spawn" starts no zygote.
        variable: the environment variable of that setting, which counts in the model process if the launch did not.
        path: directory of the model.
    """
    cls = type(model)
    # Nested, so that nothing of it is unpickled, and imported, before the zygote is started.
    return _rebuild_model, (method, variable, path, cls.__module__, cls.__qualname__, pickle.dumps(vars(model)))


def _rebuild_model(method: str | None, variable: str, path: str, module: str, name: str, state: bytes) -> Any:
    in_model_process = SUB_POOL in sys.argv
    if in_model_process:
        engine_log.include_our_loggers()
        preload.start_zygote(method or os.environ.get(variable) or "auto", path)
    collects = gc.isenabled()
    gc.disable()  # it takes a fourth of the time of the imports and finds nothing
    try:
        cls = getattr(importlib.import_module(module), name)
        model = cls.__new__(cls)
        vars(model).update(pickle.loads(state))
    finally:
        if collects:
            gc.enable()
    if in_model_process:
        model_process.configure_loggers()
        gc.freeze()  # what was imported stays: no collection has to look at it again
    return model
