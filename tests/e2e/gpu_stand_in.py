"""Stands in for the one thing that a model across several workers needs of a GPU here: that a worker counts one.

``install`` makes a directory for ``PYTHONPATH``. In each Python process that has it there, Xinference counts one GPU.
It then starts a process for a rank in each worker, and vLLM's CPU build runs in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from changed_modules import Changing, python_path


def install(directory: Path) -> str:
    """Make the files in ``directory``; what ``PYTHONPATH`` is to be."""
    return python_path(directory, __name__)


def begin() -> None:
    """Called in each Python process as it begins."""
    sys.meta_path.insert(0, Changing("xinference.device_utils", _count_one))


def _count_one(module: Any) -> None:
    module.gpu_count = lambda: 1
