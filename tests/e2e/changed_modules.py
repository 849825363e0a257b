"""Changes modules of Xinference in each Python process of a cluster, as it imports them: what stand-ins are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def python_path(directory: Path, module: str) -> str:
    """What ``PYTHONPATH`` is to be so that each Python process calls ``begin()`` of ``module``, a file beside this one.

    Args:
        directory: gets the file that does so.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(f"import {module}\n{module}.begin()\n")
    earlier = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(directory), str(Path(__file__).parent), *earlier])


class Changing:
    """A finder for ``sys.meta_path``: calls ``change`` with the module ``name`` when that has been imported."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name = name
        self._change = change

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: Any) -> None:
            run(module)
            self._change(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec
