"""``python -m xinf_vllm_backend.process.zygote PRELOAD HAZARD OPTIONS``: a host zygote; see :mod:`.host`."""

from __future__ import annotations

import importlib
import json
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .server import serve_host


def main() -> None:
    preload, hazard, options = sys.argv[1:]
    given = json.loads(options)
    asked, ready, parent = given["fds"]
    serve_host(
        socket.socket(fileno=asked),
        Connection(ready, readable=False),
        lambda: _function(preload)(),
        lambda: _function(hazard)(),
        parent,
        given["own"],
    )


def _function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    return found


main()
