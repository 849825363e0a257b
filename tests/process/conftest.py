"""Every test here starts real processes, and none may outlive its test."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import psutil
import pytest
from process_helpers import TIMEOUT

_PR_SET_CHILD_SUBREAPER = 36


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asynchronous tests run on both loops that Xinference uses."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    with contextlib.suppress(ImportError):
        factories["uvloop"] = importlib.import_module("uvloop").new_event_loop
    return factories


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Orphans come to us and not to pid 1, so that those are found too."""
    with _as_subreaper():
        yield
        left = _left_after(TIMEOUT)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=TIMEOUT)
    assert not left, f"left running: {left}"


@pytest.fixture(autouse=True)
def the_runner_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every spawned process would import the script ``pytest`` as its main module, and with it pytest."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


@pytest.fixture(autouse=True)
def output_is_buffered_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the runner does: tox sets this variable."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def _left_after(timeout: float) -> list[psutil.Process]:
    for child in multiprocessing.active_children():
        child.join(timeout)  # not psutil's wait, which would take the exit code away from it
    ours = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    others = [process for process in psutil.Process().children(recursive=True) if process.pid != ours]
    return psutil.wait_procs(others, timeout=timeout)[1]


@contextlib.contextmanager
def _as_subreaper() -> Iterator[None]:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
