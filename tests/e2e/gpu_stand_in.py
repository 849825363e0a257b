"""Stands in for the one thing that a model across several workers needs of a GPU here: that a worker counts one.

``install`` makes a directory for ``PYTHONPATH``. In each Python process that has it there, Xinference counts one GPU.
It then starts a process for a rank in each worker, and vLLM's CPU build runs in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def install(directory: Path) -> str:
    """Make the files in ``directory``; what ``PYTHONPATH`` is to be."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(f"import {__name__}\n{__name__}.begin()\n")
    earlier = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(directory), str(Path(__file__).parent), *earlier])


def begin() -> None:
    """Called in each Python process as it begins."""
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds Xinference's module of devices, and has it count one."""

    NAME = "xinference.device_utils"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.NAME:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: Any) -> None:
            run(module)
            module.gpu_count = lambda: 1

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec
