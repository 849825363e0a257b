"""What the zygotes of these tests import, and why they may not fork; each function is called in the zygote."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType, SimpleNamespace

import blocking_at_import

from xinf_vllm_backend.engine.seams import platform
from xinf_vllm_backend.process.zygote import checked

_LOADED_BY = os.getpid()  # the zygote, also in its children
_kept: list[object] = []


def modules(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


def behind(gate: blocking_at_import.Gate) -> Callable[[], None]:
    """A preload that waits until ``gate`` is opened, each time."""
    return functools.partial(blocking_at_import.wait_at, gate.environment[blocking_at_import.VARIABLE])


def a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def and_raise(attempts: Path) -> None:
    _count(attempts)
    raise ImportError("no such library")


def and_die(attempts: Path) -> None:
    _count(attempts)
    os.kill(os.getpid(), signal.SIGKILL)


def a_process(pid_file: Path) -> None:
    """Leave a process behind that nobody waits for, as some libraries do."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ends with us
    pid_file.write_text(str(process.pid))
    _kept.append(process)


def a_stall_of_each_child() -> None:
    """Have each child of the zygote stop before it reads anything."""
    spawn._main = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]


def a_library(path: Path, call: str = "") -> None:
    """Load a library, and call a function of it with 0."""
    library = ctypes.CDLL(str(path))
    if call:
        library[call](0)


def an_open_device(path: Path) -> None:
    """Open ``path``, which stands for the files that drivers open."""
    platform.DEVICE_FILES = (str(path),)
    _kept.append(path.open())


def a_torch(
    accelerator: str, is_initialized: bool = False, fork: str = "clean", cuda: str | None = None, driver: str = ""
) -> None:
    """Put a stand-in for torch in place.

    Args:
        fork: "clean"; "bad", as torch has it in the forks of a process that asked for its devices; "unknown", if
            torch cannot tell.
        cuda: version of CUDA that it is built for.
        driver: path of CUDA's driver; loaded, if one is given.
    """
    if driver:
        a_library(Path(driver))
    module = ModuleType(f"torch.{accelerator}")
    module.__dict__["is_initialized"] = lambda: is_initialized
    if fork != "unknown":
        module.__dict__["_is_in_bad_fork"] = lambda: fork == "bad" and os.getpid() != _LOADED_BY
    torch = ModuleType("torch")
    torch.__dict__[accelerator] = module
    torch.__dict__["version"] = SimpleNamespace(cuda=cuda)
    torch.__dict__["set_num_threads"] = lambda count: None
    sys.modules.update({"torch": torch, module.__name__: module})


def little_patience() -> None:
    checked.CHECK_TIMEOUT = 0.2


def _count(attempts: Path) -> None:
    with attempts.open("a") as file:
        file.write("x")


# -- hazards


def a_hazard() -> str:
    return "it has initialised an accelerator"


def a_hazard_unless(path: Path) -> str | None:
    return None if path.exists() else "it is not the time"


def a_hazard_that_raises() -> str | None:
    raise RuntimeError("the driver is gone")


def a_child_that(how: str, gate: Path | None = None) -> str | None:
    """No hazard in the zygote; in a child of it none either once ``gate`` exists, and before that it does ``how``."""
    if os.getpid() == _LOADED_BY or (gate is not None and gate.exists()):
        return None
    if how == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    raise RuntimeError("the driver is gone")
